// pack_bytes.h: codes of one tile into the byte order of its layout. 128-bit vectors suffice: this is a few percent of
// the packing time.
#pragma once

#include "pack_vector.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

KRASIS_INLINE __m128i load_codes(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }
KRASIS_INLINE void store_words(void *p, __m128i words) { _mm_storeu_si128(static_cast<__m128i *>(p), words); }

// Stores column i of the 4x4 matrix of words whose rows are a, b, c, d at p + i * stride.
KRASIS_INLINE void store_transposed(uint32_t *p, int64_t stride, __m128i a, __m128i b, __m128i c, __m128i d) {
    const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
    const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
    store_words(p, _mm_unpacklo_epi64(ab_low, cd_low));
    store_words(p + stride, _mm_unpackhi_epi64(ab_low, cd_low));
    store_words(p + 2 * stride, _mm_unpacklo_epi64(ab_high, cd_high));
    store_words(p + 3 * stride, _mm_unpackhi_epi64(ab_high, cd_high));
}

// codes [16 k][64 n] of 4 bits, one a byte, to the 128 words of a Marlin tile. Word (n%8, p, n/16), p = k%8/2, holds
// the bytes b[c], b[c+8], d[c], d[c+8] with c = n%8, b = codes of k = 2p and 2p+8, d = of 2p+1 and 2p+9.
inline void marlin_tile_4(const uint8_t *codes, uint32_t *out) {
    for (int p = 0; p < 4; ++p) {
        const uint8_t *const even = codes + 2 * p * 64;
        __m128i low[4], high[4];
        for (int j = 0; j < 4; ++j) {
            const uint8_t *const at = even + 16 * j;
            const __m128i b = _mm_or_si128(load_codes(at), _mm_slli_epi16(load_codes(at + 8 * 64), 4));
            const __m128i d = _mm_or_si128(load_codes(at + 64), _mm_slli_epi16(load_codes(at + 9 * 64), 4));
            const __m128i b_pairs = _mm_unpacklo_epi8(b, _mm_srli_si128(b, 8));
            const __m128i d_pairs = _mm_unpacklo_epi8(d, _mm_srli_si128(d, 8));
            low[j] = _mm_unpacklo_epi16(b_pairs, d_pairs);
            high[j] = _mm_unpackhi_epi16(b_pairs, d_pairs);
        }
        store_transposed(out + p * 4, 16, low[0], low[1], low[2], low[3]);
        store_transposed(out + 64 + p * 4, 16, high[0], high[1], high[2], high[3]);
    }
}

// The same for 8 bits: 256 words, word (n%8, p, n/8) holds the codes of k = 2p, 2p+8, 2p+1, 2p+9.
inline void marlin_tile_8(const uint8_t *codes, uint32_t *out) {
    for (int p = 0; p < 4; ++p) {
        __m128i words[8][2];  // [n/8][n%8/4]
        for (int j = 0; j < 4; ++j) {
            const uint8_t *const at = codes + 2 * p * 64 + 16 * j;
            const __m128i a = load_codes(at), b = load_codes(at + 8 * 64);
            const __m128i c = load_codes(at + 64), d = load_codes(at + 9 * 64);
            const __m128i ab_low = _mm_unpacklo_epi8(a, b), ab_high = _mm_unpackhi_epi8(a, b);
            const __m128i cd_low = _mm_unpacklo_epi8(c, d), cd_high = _mm_unpackhi_epi8(c, d);
            words[2 * j][0] = _mm_unpacklo_epi16(ab_low, cd_low);
            words[2 * j][1] = _mm_unpackhi_epi16(ab_low, cd_low);
            words[2 * j + 1][0] = _mm_unpacklo_epi16(ab_high, cd_high);
            words[2 * j + 1][1] = _mm_unpackhi_epi16(ab_high, cd_high);
        }
        for (int h = 0; h < 2; ++h) {
            uint32_t *const at = out + h * 128 + p * 8;
            store_transposed(at, 32, words[0][h], words[1][h], words[2][h], words[3][h]);
            store_transposed(at + 4, 32, words[4][h], words[5][h], words[6][h], words[7][h]);
        }
    }
}

// codes [32 k][32 rows] of 4 bits (rows 64 bytes apart) to u8 [8 k4][16][4 k] with row j low and row 16 + j high.
// part_rows 16: only 16 rows are given, for the low (part_offset 0) or the high nibbles; the others stay.
inline void i4_tile(const uint8_t *codes, int64_t part_rows, int64_t part_offset, uint8_t *out) {
    const bool whole = part_rows == 32;
    const __m128i kept = _mm_set1_epi8(whole ? 0 : part_offset == 0 ? static_cast<char>(0xf0) : 0x0f);
    for (int k4 = 0; k4 < 8; ++k4) {
        __m128i nibbles[4];
        for (int i = 0; i < 4; ++i) {
            const uint8_t *const at = codes + (4 * k4 + i) * 64;
            const __m128i first = load_codes(at);
            const __m128i low = part_offset == 0 ? first : _mm_slli_epi16(first, 4);
            nibbles[i] = whole ? _mm_or_si128(low, _mm_slli_epi16(load_codes(at + 16), 4)) : low;
        }
        const __m128i a = _mm_unpacklo_epi8(nibbles[0], nibbles[1]), b = _mm_unpackhi_epi8(nibbles[0], nibbles[1]);
        const __m128i c = _mm_unpacklo_epi8(nibbles[2], nibbles[3]), d = _mm_unpackhi_epi8(nibbles[2], nibbles[3]);
        const __m128i bytes[4] = {_mm_unpacklo_epi16(a, c), _mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(b, d),
                                  _mm_unpackhi_epi16(b, d)};
        for (int i = 0; i < 4; ++i) {
            uint8_t *const at = out + k4 * 64 + i * 16;
            store_words(at, _mm_or_si128(bytes[i], _mm_and_si128(load_codes(at), kept)));
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
