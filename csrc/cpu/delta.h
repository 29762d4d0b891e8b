// delta.h: the parts of krasis_gated_delta, per instruction set.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kMaxDeltaDim = 256, kMaxConvWidth = 8;

inline int64_t delta_channels(const krasis_gated_delta_args &args) {
    return 2 * args.key_heads * args.key_dim + args.value_heads * args.value_dim;
}

// What one call of delta_conv does: the channels of a head of q, of k or of v.
inline int64_t delta_conv_units(const krasis_gated_delta_args &args) { return 2 * args.key_heads + args.value_heads; }

// Value channels that one call of delta_scan does; a matrix lies in tiles of so many.
constexpr int64_t kDeltaTile = 16;

// Columns of gates: b of each head, and a unless each channel has its own.
inline int64_t delta_gate_columns(const krasis_gated_delta_args &args) {
    return (args.decays ? 1 : 2) * args.value_heads;
}

inline float *delta_matrices(const krasis_gated_delta_args &args, const krasis_span &span) {
    return reinterpret_cast<float *>(static_cast<uint8_t *>(span.keys) + args.matrices_offset_bytes);
}

inline float *delta_columns(const krasis_gated_delta_args &args, const krasis_span &span) {
    return reinterpret_cast<float *>(static_cast<uint8_t *>(span.keys) + args.columns_offset_bytes);
}

#define KRASIS_DECLARE_DELTA(isa)                                                                              \
    namespace isa {                                                                                            \
    /* The convolution and silu of a head's channels in all rows of a span, in place; q and k to length 1. */  \
    void delta_conv(const krasis_gated_delta_args &args, const krasis_span &span, int64_t unit);               \
    /* Rows [begin, end) of gates, in place: b to how much is written, a to how much of the state stays. */    \
    void delta_gates(const krasis_gated_delta_args &args, int64_t begin, int64_t end);                         \
    /* The rule for one tile of a head's channels in all rows of a span. */                                    \
    void delta_scan(const krasis_gated_delta_args &args, const krasis_span &span, int64_t head, int64_t tile); \
    /* Rows [begin, end) of out: norm by head, times the gate of z. */                                         \
    void delta_norm(const krasis_gated_delta_args &args, int64_t begin, int64_t end);                          \
    }
KRASIS_DECLARE_DELTA(avx2)
KRASIS_DECLARE_DELTA(avx512)
#undef KRASIS_DECLARE_DELTA

}  // namespace krasis
