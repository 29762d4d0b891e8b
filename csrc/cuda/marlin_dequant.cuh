// marlin_dequant.cuh: 4-bit Marlin words to 16-bit B fragments.
//
// A word holds eight codes of one lane: nibble 2h + i + 4e is column half h, row half i, row parity e, so that a word
// shifted right by 4 (2h + i) has the two codes of one fragment register in the low bits of its halves.
#pragma once

#include "simt.h"

namespace krasis::cuda {

// Codes u = q + 8. Masked with 0x000f000f, an exponent or-ed in, they are the floats base + u; subtracting base + 8
// leaves q exactly. 128 + u is exact in bf16, 1024 + u in fp16.
struct BiasedCodes {
    static constexpr bool kHasBlockScales = false;
};

// E2M1 codes, whose blocks of 32 along k have scales 2^(e - 127), e a byte (MXFP4). Sign, exponent and mantissa are put
// where a 16-bit float has its own: that is the weight, zeros and halves included, times 2^-126 (fp16: 2^-14). One
// product with a power of two makes it the weight in a unit, exactly, so that sums need no scales but the unit at the
// end: 2^64 for bf16, which has room for all scales from 2^-62 to 2^65. fp16 has less: 2^4, and scales from 2^-19 to
// 2^5 are exact, those above count as 2^5.
struct E2m1Codes {
    static constexpr bool kHasBlockScales = true;
};

KRASIS_DEVICE uint32_t codes_to_floats(Bf16 type, uint32_t codes) {
    return simt::add2(type, simt::and_or<0x000f000fu, 0x43004300u>(codes), 0xc308c308u);  // -136
}
KRASIS_DEVICE uint32_t codes_to_floats(F16 type, uint32_t codes) {
    return simt::add2(type, simt::and_or<0x000f000fu, 0x64006400u>(codes), 0xe408e408u);  // -1032
}

// b[h] is the fragment of columns 8h..8h+7 of the word's 16 columns.
template <class Type>
KRASIS_DEVICE void dequantize_word(uint32_t word, uint32_t (&b)[2][2]) {
    KRASIS_UNROLL
    for (int h = 0; h < 2; ++h) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) b[h][i] = codes_to_floats(Type{}, word >> (4 * (2 * h + i)));
    }
}

KRASIS_DEVICE float block_unit(Bf16) { return 0x1p64f; }
KRASIS_DEVICE float block_unit(F16) { return 0x1p4f; }

// What takes the codes of a block to weights in the unit, in both halves. exponent: the block's byte.
KRASIS_DEVICE uint32_t block_factor(Bf16, uint32_t exponent) { return (exponent + 62) * 0x00800080u; }
KRASIS_DEVICE uint32_t block_factor(F16, uint32_t exponent) {
    const uint32_t known = exponent < 102 ? 102 : exponent < 132 ? exponent : 132;
    return (known - 102) * 0x04000400u;
}

// The codes in the high bits of the halves.
KRASIS_DEVICE uint32_t e2m1_bits(Bf16, uint32_t codes) { return (codes & 0x80008000u) | (codes >> 6 & 0x01c001c0u); }
KRASIS_DEVICE uint32_t e2m1_bits(F16, uint32_t codes) { return (codes & 0x80008000u) | (codes >> 3 & 0x0e000e00u); }

// As dequantize_word. exponents: of column 8h + lane / 4 in byte h.
template <class Type>
KRASIS_DEVICE void dequantize_e2m1(uint32_t word, uint32_t exponents, uint32_t (&b)[2][2]) {
    KRASIS_UNROLL
    for (int h = 0; h < 2; ++h) {
        const uint32_t factor = block_factor(Type{}, exponents >> (8 * h) & 0xff);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            b[h][i] = simt::mul2(Type{}, e2m1_bits(Type{}, word << (12 - 4 * (2 * h + i))), factor);
        }
    }
}

}  // namespace krasis::cuda
