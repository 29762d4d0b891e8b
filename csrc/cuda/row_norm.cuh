// row_norm.cuh: one over the root mean square of a row, the same bits in every kernel that norms rows.
#pragma once

#include "vector8.cuh"

namespace krasis::cuda {

inline constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

// The sum over a warp, in every lane, added in the same order whatever the launch.
KRASIS_DEVICE float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

// Of the k elements of x from `row` on. All threads of a block of kNormThreads or more call it. sums: shared, float
// [kNormWarps].
KRASIS_DEVICE float row_scale(const void *x, int64_t row, int64_t k, int32_t dtype, float eps, float *sums) {
    const int thread = static_cast<int>(simt::thread_x());
    if (thread < kNormThreads) {  // whole warps
        float square = 0;
        for (int64_t i = thread * kVector; i < k; i += kNormThreads * kVector) {
            float values[kVector];
            load8(x, row + i, dtype, values);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) square = simt::fused_multiply_add(values[j], values[j], square);
        }
        square = warp_sum(square);
        if (thread % 32 == 0) simt::shared_store(sums + thread / 32, square);
    }
    simt::sync_threads();
    float total = 0;
    KRASIS_UNROLL
    for (int w = 0; w < kNormWarps; ++w) total += simt::shared_load<float>(sums + w);
    return simt::reciprocal_sqrt(total / static_cast<float>(k) + eps);
}

// Eight elements of the normed row.
KRASIS_DEVICE void load_normed8(const void *x, int64_t row, int64_t i, int32_t dtype, const void *weight,
                                int32_t weight_dtype, float scale, float (&values)[kVector]) {
    float weights[kVector];
    load8(x, row + i, dtype, values);
    load8(weight, i, weight_dtype, weights);
    KRASIS_UNROLL
    for (int j = 0; j < kVector; ++j) values[j] = values[j] * scale * weights[j];
}

}  // namespace krasis::cuda
