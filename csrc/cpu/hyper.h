// hyper.h: rows of residual streams that small matrices mix, per instruction set.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

// One call of krasis_hyper_sum or _add; each uses what it names in krasis_streams.h.
struct HyperArgs {
    const float *x;
    const float *added;  // of add
    const float *shares;
    int64_t streams, k, ld;
    float *out;
};

constexpr int64_t kMostStreams = 64;

#define KRASIS_DECLARE_HYPER(isa)                                      \
    namespace isa { /* rows [begin, end) of tokens */                  \
    void hyper_sum(const HyperArgs &args, int64_t begin, int64_t end); \
    void hyper_add(const HyperArgs &args, int64_t begin, int64_t end); \
    float hyper_inverse_rms(const float *x, int64_t size, float eps);  \
    }
KRASIS_DECLARE_HYPER(avx2)
KRASIS_DECLARE_HYPER(avx512)
#undef KRASIS_DECLARE_HYPER

}  // namespace krasis
