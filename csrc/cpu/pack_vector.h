// pack_vector.h: what the packers need beyond simd.h: 32-bit integers in lanes, scales as stored, transposed loads.
#pragma once

#include <cstdint>

#include "../krasis.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// Adding kMagic rounds |x| < 2^22 to the nearest whole number, ties to even, and leaves it in the low bits.
constexpr float kMagic = 0x1.8p23f;
constexpr int32_t kMagicBits = 0x4b400000;

// The control word that results are defined for (round to nearest, denormals kept), whatever the thread was set to.
class FloatingPointMode {
  public:
    FloatingPointMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~FloatingPointMode() { _mm_setcsr(saved_); }
    FloatingPointMode(const FloatingPointMode &) = delete;
    FloatingPointMode &operator=(const FloatingPointMode &) = delete;

  private:
    unsigned saved_;
};

// ---- kLanes integers ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct VI {
    __m512i v;
    static KRASIS_INLINE VI set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
    KRASIS_INLINE void store(void *p) const { _mm512_storeu_si512(p, v); }
};
KRASIS_INLINE VI bits(V a) { return {_mm512_castps_si512(a.v)}; }
KRASIS_INLINE V as_float(VI a) { return {_mm512_castsi512_ps(a.v)}; }
KRASIS_INLINE VI truncated(V a) { return {_mm512_cvttps_epi32(a.v)}; }
KRASIS_INLINE V to_float(VI a) { return {_mm512_cvtepi32_ps(a.v)}; }
KRASIS_INLINE VI operator+(VI a, VI b) { return {_mm512_add_epi32(a.v, b.v)}; }
KRASIS_INLINE VI operator-(VI a, VI b) { return {_mm512_sub_epi32(a.v, b.v)}; }
KRASIS_INLINE VI operator&(VI a, VI b) { return {_mm512_and_si512(a.v, b.v)}; }
KRASIS_INLINE VI operator|(VI a, VI b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N>
KRASIS_INLINE VI shift_left(VI a) {
    return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
KRASIS_INLINE VI shift_right(VI a) {
    return {_mm512_srli_epi32(a.v, N)};
}
KRASIS_INLINE V where_less(V a, V b, V then, V otherwise) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), otherwise.v, then.v)};
}
KRASIS_INLINE void store_u8(uint8_t *p, VI a) {  // the low bytes
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(a.v));
}
KRASIS_INLINE void store_u16(uint16_t *p, VI a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(a.v));
}
KRASIS_INLINE V through_f16(V a) { return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

#else

struct VI {
    __m256i v;
    static KRASIS_INLINE VI set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
    KRASIS_INLINE void store(void *p) const { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
};
KRASIS_INLINE VI bits(V a) { return {_mm256_castps_si256(a.v)}; }
KRASIS_INLINE V as_float(VI a) { return {_mm256_castsi256_ps(a.v)}; }
KRASIS_INLINE VI truncated(V a) { return {_mm256_cvttps_epi32(a.v)}; }
KRASIS_INLINE V to_float(VI a) { return {_mm256_cvtepi32_ps(a.v)}; }
KRASIS_INLINE VI operator+(VI a, VI b) { return {_mm256_add_epi32(a.v, b.v)}; }
KRASIS_INLINE VI operator-(VI a, VI b) { return {_mm256_sub_epi32(a.v, b.v)}; }
KRASIS_INLINE VI operator&(VI a, VI b) { return {_mm256_and_si256(a.v, b.v)}; }
KRASIS_INLINE VI operator|(VI a, VI b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int N>
KRASIS_INLINE VI shift_left(VI a) {
    return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
KRASIS_INLINE VI shift_right(VI a) {
    return {_mm256_srli_epi32(a.v, N)};
}
KRASIS_INLINE V where_less(V a, V b, V then, V otherwise) {
    return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
KRASIS_INLINE __m128i low_halves(VI a) {  // of integers in 0..65535
    return _mm_packus_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
}
KRASIS_INLINE void store_u8(uint8_t *p, VI a) {  // integers in 0..255
    const __m128i halves = low_halves(a);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(halves, halves));
}
KRASIS_INLINE void store_u16(uint16_t *p, VI a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), low_halves(a)); }
KRASIS_INLINE V through_f16(V a) { return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

#endif

// ---- scales as stored --------------------------------------------------------------------------------------

KRASIS_INLINE VI bf16_bits(V a) {  // round to nearest even; a finite
    const VI x = bits(a);
    const VI odd = shift_right<16>(x) & VI::set1(1);
    return shift_right<16>(x + VI::set1(0x7fff) + odd);
}

// The smallest and largest magnitude a scale may take. bfloat16 denormals are left out: GPUs flush them.
KRASIS_INLINE float least_scale(int32_t dtype) { return dtype == KRASIS_BF16 ? 0x1p-126f : 0x1p-24f; }
KRASIS_INLINE float largest_scale(int32_t dtype) { return dtype == KRASIS_BF16 ? 0x1.fep127f : 65504.0f; }

// A positive scale as the kernels will read it back.
KRASIS_INLINE V stored_scale(V magnitude, int32_t dtype) {
    const V rounded = dtype == KRASIS_BF16 ? as_float(shift_left<16>(bf16_bits(magnitude))) : through_f16(magnitude);
    return max(min(rounded, V::set1(largest_scale(dtype))), V::set1(least_scale(dtype)));
}

KRASIS_INLINE void store_scales(uint16_t *p, V stored, int32_t dtype) {
    if (dtype == KRASIS_BF16) {
        store_u16(p, shift_right<16>(bits(stored)));
    } else {
        stored.store_f16(p);
    }
}

// ---- transposed loads --------------------------------------------------------------------------------------

template <int kDtype>
KRASIS_INLINE __m256 load_8(const uint8_t *p) {
    if constexpr (kDtype == KRASIS_F32) {
        return V8::load(reinterpret_cast<const float *>(p)).v;
    } else if constexpr (kDtype == KRASIS_BF16) {
        return V8::load_bf16(reinterpret_cast<const uint16_t *>(p)).v;
    } else {
        return V8::load_f16(reinterpret_cast<const uint16_t *>(p)).v;
    }
}

constexpr int64_t element_bytes(int32_t dtype) { return dtype == KRASIS_F32 ? 4 : 2; }

KRASIS_INLINE void transpose_8x8(__m256 (&x)[8]) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}

// kLanes rows of kDtype, k columns (a multiple of 8), to out[k][kLanes] floats. absmax: of each row; a NaN or an
// infinity among the weights leaves bits >= 0x7f800000 there, because magnitudes are compared as integers. next: rows
// that will be loaded later, of the same stride and columns; they are only prefetched. Strided rows defeat the
// hardware's own prefetching.
template <int kDtype>
inline void load_transposed(const uint8_t *rows, const uint8_t *next, int64_t row_bytes, int64_t k, float *out,
                            float *absmax) {
    constexpr int64_t kLine = 64 / element_bytes(kDtype);
    for (int half = 0; half < kLanes; half += 8) {
        __m256i most = _mm256_setzero_si256();
        const uint8_t *const first = rows + half * row_bytes;
        for (int64_t i = 0; i < k; i += 8) {
            for (int r = 0; r < 8 && i % kLine == 0; ++r) {
                _mm_prefetch(next + (half + r) * row_bytes + i * element_bytes(kDtype), _MM_HINT_T0);
            }
            __m256 x[8];
            for (int r = 0; r < 8; ++r) {
                x[r] = load_8<kDtype>(first + r * row_bytes + i * element_bytes(kDtype));
            }
            transpose_8x8(x);
            for (int c = 0; c < 8; ++c) {
                const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x[c]), _mm256_set1_epi32(0x7fffffff));
                most = _mm256_max_epi32(most, magnitude);
                _mm256_storeu_ps(out + (i + c) * kLanes + half, x[c]);
            }
        }
        _mm256_storeu_ps(absmax + half, _mm256_castsi256_ps(most));
    }
}

inline void load_transposed(int32_t dtype, const uint8_t *rows, const uint8_t *next, int64_t row_bytes, int64_t k,
                            float *out, float *absmax) {
    if (dtype == KRASIS_F32) {
        load_transposed<KRASIS_F32>(rows, next, row_bytes, k, out, absmax);
    } else if (dtype == KRASIS_BF16) {
        load_transposed<KRASIS_BF16>(rows, next, row_bytes, k, out, absmax);
    } else {
        load_transposed<KRASIS_F16>(rows, next, row_bytes, k, out, absmax);
    }
}

// The first lane whose magnitude is not finite or above limit; -1: none. Compares bits, so that NaN counts.
inline int first_bad_lane(const float *absmax, float limit) {
    int32_t limit_bits;
    __builtin_memcpy(&limit_bits, &limit, sizeof limit_bits);
    for (int half = 0; half < kLanes; half += 8) {
        const __m256i magnitude = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(absmax + half));
        const __m256i above = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(limit_bits));
        const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(above));
        if (mask) {
            return half + __builtin_ctz(static_cast<unsigned>(mask));
        }
    }
    return -1;
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
