// numeric.h: the 16-bit floats of activations and scales, as bits, with the same conversions on GPU and host.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace krasis {

KRASIS_BOTH uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

KRASIS_BOTH float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// Round to nearest even; NaN stays NaN.
KRASIS_BOTH uint16_t bf16_from_float(float value) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

KRASIS_BOTH float bf16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

KRASIS_BOTH uint16_t f16_from_float(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal halves are multiples of 2^-24: adding 0.5 leaves that multiple, rounded, in the low bits.
        const float shifted = bits_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

KRASIS_BOTH float f16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x400u) {
        const float value = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -value : value;
    }
    return bits_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// Tags by which kernels choose a 16-bit type at compile time.
struct Bf16 {
    KRASIS_BOTH static float to_float(uint16_t bits) { return bf16_to_float(bits); }
    KRASIS_BOTH static uint16_t from_float(float value) { return bf16_from_float(value); }
};
struct F16 {
    KRASIS_BOTH static float to_float(uint16_t bits) { return f16_to_float(bits); }
    KRASIS_BOTH static uint16_t from_float(float value) { return f16_from_float(value); }
};

// Two 16-bit floats in one word, the first in the low half.
template <class Type>
KRASIS_BOTH uint32_t pack2(float low, float high) {
    return static_cast<uint32_t>(Type::from_float(low)) | (static_cast<uint32_t>(Type::from_float(high)) << 16);
}

}  // namespace krasis
