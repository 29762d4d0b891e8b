// mamba.h: the parts of krasis_mamba2, per instruction set.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kMaxMambaConv = 8;

// Channels that the projections have between them: z, and what the scan and the skip give.
inline int64_t mamba_inner(const krasis_mamba2_args &args) { return args.heads * args.head_dim; }

// Channels of the convolution: x, B and C.
inline int64_t mamba_channels(const krasis_mamba2_args &args) {
    return mamba_inner(args) + 2 * args.groups * args.state_dim;
}

// Channels that one call of mamba_conv does at most.
constexpr int64_t kMambaConvUnit = 64;

// Channels of a head that one call of mamba_scan does; a matrix lies in tiles of so many.
constexpr int64_t kMambaTile = 16;

inline float *mamba_matrices(const krasis_mamba2_args &args, const krasis_span &span) {
    return reinterpret_cast<float *>(static_cast<uint8_t *>(span.keys) + args.matrices_offset_bytes);
}

inline float *mamba_columns(const krasis_mamba2_args &args, const krasis_span &span) {
    return reinterpret_cast<float *>(static_cast<uint8_t *>(span.keys) + args.columns_offset_bytes);
}

#define KRASIS_DECLARE_MAMBA(isa)                                                                         \
    namespace isa {                                                                                       \
    /* The convolution and silu of a unit's channels in all rows of a span, in place. */                  \
    void mamba_conv(const krasis_mamba2_args &args, const krasis_span &span, int64_t unit);               \
    /* Rows [begin, end) of steps, in place: to how far a token goes. */                                  \
    void mamba_steps(const krasis_mamba2_args &args, int64_t begin, int64_t end);                         \
    /* The scan and the skip of one tile of a head's channels in all rows of a span. */                   \
    void mamba_scan(const krasis_mamba2_args &args, const krasis_span &span, int64_t head, int64_t tile); \
    /* Rows [begin, end) of out: times silu of z, then the norm by group. */                              \
    void mamba_norm(const krasis_mamba2_args &args, int64_t begin, int64_t end);                          \
    }
KRASIS_DECLARE_MAMBA(avx2)
KRASIS_DECLARE_MAMBA(avx512)
#undef KRASIS_DECLARE_MAMBA

}  // namespace krasis
