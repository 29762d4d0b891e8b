// cache_bytes.h: rows of 8-bit keys and values: int8 codes, then a float32 scale of each part (per-ISA header).
#pragma once

#include <cstring>

#include "acts_block.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// n floats, n % 16 == 0 -> codes and their scale. A NaN or infinity among them is in the scale.
KRASIS_INLINE void store_bytes(const float *x, int64_t n, int8_t *codes, int8_t *scale_at) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) largest = _mm256_max_epi32(largest, magnitude_bits(V8::load(x + i)));
    __m128i best = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0x4e));
    best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0xb1));
    const float scale = _mm_cvtss_f32(_mm_castsi128_ps(best)) / 127.0f;
    std::memcpy(scale_at, &scale, sizeof(scale));
    if (scale == 0.0f) {
        std::memset(codes, 0, static_cast<size_t>(n));
        return;
    }
    const V8 scales = V8::set1(scale);
    for (int64_t i = 0; i < n; i += 16) {
        const __m256i a = quantized(V8::load(x + i), scales), b = quantized(V8::load(x + i + 8), scales);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), bytes);
    }
}

// n floats of codes, n % 16 == 0.
KRASIS_INLINE void load_bytes(const int8_t *codes, const int8_t *scale_at, int64_t n, float *to) {
    float scale;
    std::memcpy(&scale, scale_at, sizeof(scale));
    const V16 scales = V16::set1(scale);
    for (int64_t i = 0; i < n; i += 16) mul(V16::load_i8(codes + i), scales).store(to + i);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
