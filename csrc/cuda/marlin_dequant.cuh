// marlin_dequant.cuh: 4-bit Marlin words to 16-bit B fragments.
//
// A word holds eight codes u = q + 8 of one lane: nibble 2h + i + 4e is column half h, row half i, row parity e.
// Masking the word, shifted right by 4 (2h + i), with 0x000f000f leaves the two codes of one fragment register in the
// low bits of its halves; or-ing an exponent makes them the floats base + u, and subtracting base + 8 leaves q exactly.
#pragma once

#include "simt.h"

namespace krasis::cuda {

// 128 + u is exact in bf16, 1024 + u in fp16.
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

}  // namespace krasis::cuda
