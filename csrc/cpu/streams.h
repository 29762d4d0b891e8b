// streams.h: rows of gated residual streams, per instruction set.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

// One call of any of the functions; each uses what it names in krasis.h.
struct StreamArgs {
    const float *x;
    const float *gates;  // of mix; logits of add
    int64_t streams, k;
    float factor;  // eps of norm, scale of squash
    float *out;
    const float *weight;  // of norm; what is added of add
};

#define KRASIS_DECLARE_STREAMS(isa)                                         \
    namespace isa { /* rows [begin, end) of tokens */                       \
    void stream_norm(const StreamArgs &args, int64_t begin, int64_t end);   \
    void stream_squash(const StreamArgs &args, int64_t begin, int64_t end); \
    void stream_mix(const StreamArgs &args, int64_t begin, int64_t end);    \
    void stream_add(const StreamArgs &args, int64_t begin, int64_t end);    \
    }
KRASIS_DECLARE_STREAMS(avx2)
KRASIS_DECLARE_STREAMS(avx512)
#undef KRASIS_DECLARE_STREAMS

}  // namespace krasis
