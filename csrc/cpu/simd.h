// simd.h: the vector wrapper shared by the files of all instruction sets.
//
// Only files under cpu/avx2, cpu/avx512 and cpu/amx may include this header (directly or through a *_kernel.h):
// everything lies in the namespace of the instruction set being compiled, so that no AVX-512 copy can be linked into a
// baseline function.
//
//   V    the native vector, kLanes floats (8 or 16).
//   V16  16 floats in both sets (a pair of V for AVX2): reductions written with it give the same bits in both.
//
// Lane-wise results do not depend on the width. hsum adds in one fixed tree.
#pragma once

// GCC 12 takes the undefined-on-purpose operands inside its own AVX-512 header for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cstdint>

#if defined(KRASIS_AMX)  // which CMake defines for cpu/amx
#define KRASIS_ISA_NAMESPACE amx
#elif defined(__AVX512F__)
#define KRASIS_ISA_NAMESPACE avx512
#elif defined(__AVX2__)
#define KRASIS_ISA_NAMESPACE avx2
#else
#error "simd.h is for the files under cpu/avx2, cpu/avx512 and cpu/amx"
#endif

#define KRASIS_INLINE inline __attribute__((always_inline))

namespace krasis::KRASIS_ISA_NAMESPACE {

// ---- 8 floats ----------------------------------------------------------------------------------------------

struct V8 {
    static constexpr int kSize = 8;
    __m256 v;
    static KRASIS_INLINE V8 zero() { return {_mm256_setzero_ps()}; }
    static KRASIS_INLINE V8 set1(float x) { return {_mm256_set1_ps(x)}; }
    static KRASIS_INLINE V8 load(const float *p) { return {_mm256_loadu_ps(p)}; }
    static KRASIS_INLINE V8 load_f16(const uint16_t *p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
    }
    static KRASIS_INLINE V8 load_bf16(const uint16_t *p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static KRASIS_INLINE V8 load_i8(const int8_t *p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
    }
    KRASIS_INLINE void store(float *p) const { _mm256_storeu_ps(p, v); }
    KRASIS_INLINE void store_f16(uint16_t *p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
};

KRASIS_INLINE V8 fma(V8 a, V8 b, V8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
KRASIS_INLINE V8 fnma(V8 a, V8 b, V8 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
KRASIS_INLINE V8 add(V8 a, V8 b) { return {_mm256_add_ps(a.v, b.v)}; }
KRASIS_INLINE V8 sub(V8 a, V8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
KRASIS_INLINE V8 mul(V8 a, V8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
KRASIS_INLINE V8 div(V8 a, V8 b) { return {_mm256_div_ps(a.v, b.v)}; }
KRASIS_INLINE V8 max(V8 a, V8 b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where either is NaN
KRASIS_INLINE V8 min(V8 a, V8 b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where either is NaN
KRASIS_INLINE V8 abs(V8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
KRASIS_INLINE V8 round_even(V8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KRASIS_INLINE V8 zero_where_less(V8 x, V8 bound, V8 value) {  // 0 where x < bound, else value
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_LT_OQ), value.v)};
}
KRASIS_INLINE V8 power_of_two(V8 n) {  // 2^n for whole n in [-126, 127]
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}
KRASIS_INLINE float hsum(__m128 x) {  // (x0 + x2) + (x1 + x3)
    const __m128 pairs = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
}
KRASIS_INLINE float hmax(__m128 x) {
    const __m128 pairs = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
}
KRASIS_INLINE float hsum(V8 a) { return hsum(_mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1))); }
KRASIS_INLINE float hmax(V8 a) { return hmax(_mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1))); }

// ---- 16 floats ---------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct V16 {
    static constexpr int kSize = 16;
    __m512 v;
    static KRASIS_INLINE V16 zero() { return {_mm512_setzero_ps()}; }
    static KRASIS_INLINE V16 set1(float x) { return {_mm512_set1_ps(x)}; }
    static KRASIS_INLINE V16 load(const float *p) { return {_mm512_loadu_ps(p)}; }
    static KRASIS_INLINE V16 load_f16(const uint16_t *p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
    }
    static KRASIS_INLINE V16 load_bf16(const uint16_t *p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static KRASIS_INLINE V16 load_i8(const int8_t *p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
    }
    KRASIS_INLINE void store(float *p) const { _mm512_storeu_ps(p, v); }
    KRASIS_INLINE void store_f16(uint16_t *p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
};

KRASIS_INLINE V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KRASIS_INLINE V16 fnma(V16 a, V16 b, V16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
KRASIS_INLINE V16 add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
KRASIS_INLINE V16 sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
KRASIS_INLINE V16 mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
KRASIS_INLINE V16 div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
KRASIS_INLINE V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
KRASIS_INLINE V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
KRASIS_INLINE V16 abs(V16 a) { return {_mm512_abs_ps(a.v)}; }
KRASIS_INLINE V16 round_even(V16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
KRASIS_INLINE V16 zero_where_less(V16 x, V16 bound, V16 value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), value.v)};
}
KRASIS_INLINE V16 power_of_two(V16 n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
KRASIS_INLINE V8 low(V16 a) { return {_mm512_castps512_ps256(a.v)}; }
KRASIS_INLINE V8 high(V16 a) { return {_mm512_extractf32x8_ps(a.v, 1)}; }

using V = V16;

#else

struct V16 {
    static constexpr int kSize = 16;
    V8 a, b;
    static KRASIS_INLINE V16 zero() { return {V8::zero(), V8::zero()}; }
    static KRASIS_INLINE V16 set1(float x) { return {V8::set1(x), V8::set1(x)}; }
    static KRASIS_INLINE V16 load(const float *p) { return {V8::load(p), V8::load(p + 8)}; }
    static KRASIS_INLINE V16 load_f16(const uint16_t *p) { return {V8::load_f16(p), V8::load_f16(p + 8)}; }
    static KRASIS_INLINE V16 load_bf16(const uint16_t *p) { return {V8::load_bf16(p), V8::load_bf16(p + 8)}; }
    static KRASIS_INLINE V16 load_i8(const int8_t *p) { return {V8::load_i8(p), V8::load_i8(p + 8)}; }
    KRASIS_INLINE void store(float *p) const {
        a.store(p);
        b.store(p + 8);
    }
    KRASIS_INLINE void store_f16(uint16_t *p) const {
        a.store_f16(p);
        b.store_f16(p + 8);
    }
};

KRASIS_INLINE V16 fma(V16 x, V16 y, V16 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
KRASIS_INLINE V16 fnma(V16 x, V16 y, V16 z) { return {fnma(x.a, y.a, z.a), fnma(x.b, y.b, z.b)}; }
KRASIS_INLINE V16 add(V16 x, V16 y) { return {add(x.a, y.a), add(x.b, y.b)}; }
KRASIS_INLINE V16 sub(V16 x, V16 y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
KRASIS_INLINE V16 mul(V16 x, V16 y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
KRASIS_INLINE V16 div(V16 x, V16 y) { return {div(x.a, y.a), div(x.b, y.b)}; }
KRASIS_INLINE V16 max(V16 x, V16 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
KRASIS_INLINE V16 min(V16 x, V16 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
KRASIS_INLINE V16 abs(V16 x) { return {abs(x.a), abs(x.b)}; }
KRASIS_INLINE V16 round_even(V16 x) { return {round_even(x.a), round_even(x.b)}; }
KRASIS_INLINE V16 zero_where_less(V16 x, V16 bound, V16 value) {
    return {zero_where_less(x.a, bound.a, value.a), zero_where_less(x.b, bound.b, value.b)};
}
KRASIS_INLINE V16 power_of_two(V16 n) { return {power_of_two(n.a), power_of_two(n.b)}; }
KRASIS_INLINE V8 low(V16 x) { return x.a; }
KRASIS_INLINE V8 high(V16 x) { return x.b; }

using V = V8;

#endif

constexpr int kLanes = V::kSize;

KRASIS_INLINE float hsum(V16 x) { return hsum(add(low(x), high(x))); }
KRASIS_INLINE float hmax(V16 x) { return hmax(max(low(x), high(x))); }

// ---- exp ---------------------------------------------------------------------------------------------------

// e^x, to about 1 ulp over [-87.3365, 88.37]; 0 below (no denormals, -inf included), e^88.37 above; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r^2 q(r), q fitted to 3e-9 relative.
template <class T>
KRASIS_INLINE T exp(T x) {
    const T least = T::set1(-87.33654f);
    const T bounded = max(least, min(T::set1(88.37f), x));
    const T n = round_even(mul(bounded, T::set1(1.44269504f)));
    T r = fnma(n, T::set1(0.693359375f), bounded);  // ln 2 in two parts, the first exact for n of 8 bits
    r = fnma(n, T::set1(-2.12194440e-4f), r);
    T q = fma(T::set1(0x1.6a2448p-10f), r, T::set1(0x1.1239d6p-7f));
    q = fma(q, r, T::set1(0x1.5558f2p-5f));
    q = fma(q, r, T::set1(0x1.555492p-3f));
    q = fma(q, r, T::set1(0x1.fffffcp-2f));
    const T one_plus = add(fma(mul(r, r), q, r), T::set1(1.0f));
    return zero_where_less(x, least, mul(one_plus, power_of_two(n)));
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
