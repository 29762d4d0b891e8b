// int8_dequant.cuh: four int8 weights of one word to 16-bit or 32-bit floats, exactly.
#pragma once

#include "simt.h"

namespace krasis::cuda {

// out[0]: bytes 0 and 1, out[1]: bytes 2 and 3; crossed: bytes 0 and 2, bytes 1 and 3.
//
// bf16 has room for seven bits below an exponent of 128: with m the low seven bits and s the sign bit of a byte, the
// byte's value is (128 + m) - (128 or 256), and both are 0x4300 or-ed with bits of the byte itself.
template <bool kCrossed = false>
KRASIS_DEVICE void int8_to_floats(Bf16 type, uint32_t word, uint32_t (&out)[2]) {
    constexpr uint32_t kFirst = kCrossed ? 0x4240u : 0x4140u, kSecond = kCrossed ? 0x4341u : 0x4342u;
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t bytes = simt::byte_permute(word, 0x43434343u, i ? kSecond : kFirst);
        out[i] = simt::add2(type, bytes & 0xff7fff7fu, (bytes & 0xff80ff80u) | 0x80008000u);
    }
}

// fp16 has ten bits: 1024 + (byte + 128), less 1152.
KRASIS_DEVICE void int8_to_floats(F16 type, uint32_t word, uint32_t (&out)[2]) {
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t bytes = simt::byte_permute(word ^ 0x80808080u, 0x64646464u, i ? 0x4342u : 0x4140u);
        out[i] = simt::add2(type, bytes, 0xe480e480u);
    }
}

// 2^23 + (byte + 128), less that. Conversions by instruction run at a quarter of the speed.
KRASIS_DEVICE void int8_to_floats(uint32_t word, float (&out)[4]) {
    const uint32_t biased = word ^ 0x80808080u;
    KRASIS_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[i] = bits_float(simt::byte_permute(biased, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))) - 8388736.0f;
    }
}

}  // namespace krasis::cuda
