// vector8.cuh: rows of any of the three float types, eight elements at a time.
#pragma once

#include "krasis.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kVector = 8;

// Eight elements from index on, as floats. dtype is the same for all threads of a launch.
KRASIS_DEVICE void load8(const void *from, int64_t index, int32_t dtype, float (&values)[kVector]) {
    if (dtype == KRASIS_F32) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const simt::Words4 words =
                reinterpret_cast<const simt::Words4 *>(static_cast<const float *>(from) + index)[i];
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) values[4 * i + j] = bits_float(words.w[j]);
        }
        return;
    }
    const simt::Words4 words = *reinterpret_cast<const simt::Words4 *>(static_cast<const uint16_t *>(from) + index);
    KRASIS_UNROLL
    for (int i = 0; i < kVector; ++i) {
        const auto bits = static_cast<uint16_t>(words.w[i / 2] >> (16 * (i % 2)));
        values[i] = dtype == KRASIS_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
}

KRASIS_DEVICE void store8(void *to, int64_t index, int32_t dtype, const float (&values)[kVector]) {
    if (dtype == KRASIS_F32) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            simt::Words4 words;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) words.w[j] = float_bits(values[4 * i + j]);
            reinterpret_cast<simt::Words4 *>(static_cast<float *>(to) + index)[i] = words;
        }
        return;
    }
    simt::Words4 words;
    KRASIS_UNROLL
    for (int i = 0; i < 4; ++i) {
        words.w[i] = dtype == KRASIS_BF16 ? pack2<Bf16>(values[2 * i], values[2 * i + 1])
                                          : pack2<F16>(values[2 * i], values[2 * i + 1]);
    }
    *reinterpret_cast<simt::Words4 *>(static_cast<uint16_t *>(to) + index) = words;
}

KRASIS_DEVICE float load1(const void *from, int64_t index, int32_t dtype) {
    if (dtype == KRASIS_F32) return static_cast<const float *>(from)[index];
    const uint16_t bits = static_cast<const uint16_t *>(from)[index];
    return dtype == KRASIS_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

KRASIS_DEVICE void store1(void *to, int64_t index, int32_t dtype, float value) {
    if (dtype == KRASIS_F32) {
        static_cast<float *>(to)[index] = value;
    } else {
        static_cast<uint16_t *>(to)[index] = dtype == KRASIS_BF16 ? bf16_from_float(value) : f16_from_float(value);
    }
}

}  // namespace krasis::cuda
