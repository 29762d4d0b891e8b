// norm_sum.h: 1 / rms of a row, in one fixed order for both instruction sets (per-ISA header).
#pragma once

#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// 1 / sqrt(mean(x^2) + eps). Two accumulators of 16 lanes, then 16 at a time, then one at a time.
KRASIS_INLINE float inverse_rms(const float *x, int64_t k, float eps) {
    V16 first = V16::zero(), second = V16::zero();
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        const V16 a = V16::load(x + i), b = V16::load(x + i + 16);
        first = fma(a, a, first);
        second = fma(b, b, second);
    }
    for (; i + 16 <= k; i += 16) {
        const V16 a = V16::load(x + i);
        first = fma(a, a, first);
    }
    float sum = hsum(add(first, second));
    for (; i < k; ++i) sum += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(k) + eps);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
