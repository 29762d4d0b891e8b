// acts_block.h: one block of 32 activations to int8 (per-ISA: include only under cpu/avx2 and cpu/avx512).
#pragma once

#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

KRASIS_INLINE __m256i magnitude_bits(V8 x) {
    return _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff));
}

// The largest magnitude of 32 floats. Compared as integers, so that a NaN wins and shows in the scale.
KRASIS_INLINE float absmax_32(V8 a, V8 b, V8 c, V8 d) {
    const __m256i ab = _mm256_max_epi32(magnitude_bits(a), magnitude_bits(b));
    const __m256i cd = _mm256_max_epi32(magnitude_bits(c), magnitude_bits(d));
    const __m256i all = _mm256_max_epi32(ab, cd);
    __m128i best = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0x4e));
    best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(best));
}

// Round half to even of x / scale, within [-127, 127] whatever x is (a denormal scale is too coarse to bound it).
KRASIS_INLINE __m256i quantized(V8 x, V8 scale) {
    const V8 bounded = max(min(div(x, scale), V8::set1(127.0f)), V8::set1(-127.0f));
    return _mm256_cvtps_epi32(bounded.v);
}

// 32 floats in four registers -> q[32], *scale, *sum (see krasis_acts).
KRASIS_INLINE void quantize_block(V8 a, V8 b, V8 c, V8 d, int8_t *q, float *scale, int32_t *sum) {
    const float step = absmax_32(a, b, c, d) / 127.0f;
    *scale = step;
    if (step == 0.0f) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(q), _mm256_setzero_si256());
        *sum = 0;
        return;
    }
    const V8 steps = V8::set1(step);
    const __m256i qa = quantized(a, steps), qb = quantized(b, steps), qc = quantized(c, steps),
                  qd = quantized(d, steps);
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(qa, qb), _mm256_packs_epi32(qc, qd));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the 128-bit lanes of the packs
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(q), _mm256_permutevar8x32_epi32(packed, order));
    const __m256i total = _mm256_add_epi32(_mm256_add_epi32(qa, qb), _mm256_add_epi32(qc, qd));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    *sum = _mm_cvtsi128_si32(half);
}

KRASIS_INLINE void quantize_block(const float *x, int8_t *q, float *scale, int32_t *sum) {
    quantize_block(V8::load(x), V8::load(x + 8), V8::load(x + 16), V8::load(x + 24), q, scale, sum);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
