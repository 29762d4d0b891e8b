// avx2/gemm.cpp: strip kernels for AVX2.
//
// vpmaddubsw multiplies unsigned by signed bytes into pairs of 16 bits. Int8 codes: |w| times a with the sign of w; two
// products are at most 2 * 128 * 127, so nothing saturates. Int4 codes are stored unsigned (u = q + 8); eight pairs are
// at most 8 * 2 * 15 * 127 and so are summed in 16 bits over the whole block, and the panel's offset takes the 8 away.
// E2M1 codes become twice their value by a table, at most 12, and are multiplied as int8 codes are, but summed as
// int4's.
#include <cstring>

#include "../gemm_strip.h"

namespace krasis::avx2 {
namespace {

KRASIS_INLINE __m256i load256(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

KRASIS_INLINE __m256i broadcast32(const uint8_t *p) {
    int32_t value;
    std::memcpy(&value, p, sizeof value);
    return _mm256_set1_epi32(value);
}

KRASIS_INLINE __m256 broadcast_float(const uint8_t *p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return _mm256_set1_ps(value);
}

// GCC turns a chain of integer additions into a tree, whose leaves do not fit the sixteen registers. An empty statement
// that claims to change the sum keeps the chain.
KRASIS_INLINE void keep_in_chain(__m256i &sum) { __asm__("" : "+x"(sum)); }

// Eight scales of a block. Of E8M0 see gemm_strip.h.
template <StripFormat kFormat>
KRASIS_INLINE V8 load_scales(const uint8_t *scales, int row) {
    if constexpr (kFormat == StripFormat::kFp4) {
        const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(scales + row)));
        const __m256i one = _mm256_set1_epi32(1);
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
        const __m256i denormal = _mm256_slli_epi32(_mm256_add_epi32(e, one), 21);
        return V8{_mm256_castsi256_ps(_mm256_max_epi32(normal, denormal))};
    } else {
        return V8::load_f16(reinterpret_cast<const uint16_t *>(scales) + row);
    }
}

// How far ahead of the multiplication a lone stream of weights is fetched. Longer for 8 bits than for AVX-512: a block
// takes three times the instructions, so the core itself looks less far ahead. Longer for 4 bits gains nothing on one
// thread and cost two threads 3 % (Zen 5). Never a multiple of 4096: see avx512/gemm.cpp.
template <StripFormat kFormat>
constexpr int64_t kAheadBytes = kFourBits<kFormat> ? 6592 : 9792;

// The 8-row groups of a block are handled kGroups at a time: all four for one token, two for several. For int4 the
// groups of one pass share their bytes: group g of pass h is 8 * (h + 2 * g) with two, and 8 * (g / 2) + ... in load
// order with four.
template <StripFormat kFormat, int kGroups>
KRASIS_INLINE int group_row(int pass, int g) {
    if constexpr (kFourBits<kFormat>) {
        const int bytes = kGroups == 4 ? g / 2 : pass;  // which half of the 64 bytes
        return 8 * bytes + 16 * (g % 2);
    }
    return 8 * (pass * kGroups + g);
}

// Integer sums of one block for kGroups * 8 rows and kWidth tokens.
template <StripFormat kFormat, int kWidth, int kGroups>
KRASIS_INLINE void block_sums(const uint8_t *block, const uint8_t *panel, int pass, __m256i (&sum)[kWidth][kGroups]) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int t = 0; t < kWidth; ++t) {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) sum[t][g] = _mm256_setzero_si256();
    }
    if constexpr (kFormat == StripFormat::kI4) {
        const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4) {
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; g += 2) {
                const __m256i both = load256(block + k4 * 64 + (kGroups == 4 ? g / 2 : pass) * 32);
                const __m256i w0 = _mm256_and_si256(both, nibble);
                const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 8
                for (int t = 0; t < kWidth; ++t) {
                    const __m256i a = broadcast32(panel + t * 32 + k4 * 4);
                    sum[t][g] = _mm256_add_epi16(sum[t][g], _mm256_maddubs_epi16(w0, a));
                    sum[t][g + 1] = _mm256_add_epi16(sum[t][g + 1], _mm256_maddubs_epi16(w1, a));
                    keep_in_chain(sum[t][g]);
                    keep_in_chain(sum[t][g + 1]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < kWidth; ++t) {
            const __m256i offset = broadcast32(panel + kWidth * 36 + t * 4);
#pragma GCC unroll 4
            for (int g = 0; g < kGroups; ++g) {
                sum[t][g] = _mm256_add_epi32(_mm256_madd_epi16(sum[t][g], ones), offset);
            }
        }
    } else if constexpr (kFormat == StripFormat::kFp4) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i values =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4) {
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; g += 2) {
                const __m256i both = load256(block + k4 * 64 + (kGroups == 4 ? g / 2 : pass) * 32);
                const __m256i w0 = _mm256_shuffle_epi8(values, _mm256_and_si256(both, nibble));
                const __m256i w1 = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
                const __m256i magnitude0 = _mm256_abs_epi8(w0), magnitude1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 8
                for (int t = 0; t < kWidth; ++t) {
                    const __m256i a = broadcast32(panel + t * 32 + k4 * 4);
                    const __m256i a0 = _mm256_sign_epi8(a, w0), a1 = _mm256_sign_epi8(a, w1);
                    sum[t][g] = _mm256_add_epi16(sum[t][g], _mm256_maddubs_epi16(magnitude0, a0));
                    sum[t][g + 1] = _mm256_add_epi16(sum[t][g + 1], _mm256_maddubs_epi16(magnitude1, a1));
                    keep_in_chain(sum[t][g]);
                    keep_in_chain(sum[t][g + 1]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < kWidth; ++t) {
#pragma GCC unroll 4
            for (int g = 0; g < kGroups; ++g) sum[t][g] = _mm256_madd_epi16(sum[t][g], ones);
        }
    } else {
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4) {
            __m256i w[kGroups], magnitude[kGroups];
#pragma GCC unroll 4
            for (int g = 0; g < kGroups; ++g) {
                w[g] = load256(block + k4 * 128 + (pass * kGroups + g) * 32);
                magnitude[g] = _mm256_abs_epi8(w[g]);
            }
#pragma GCC unroll 8
            for (int t = 0; t < kWidth; ++t) {
                const __m256i a = broadcast32(panel + t * 32 + k4 * 4);
#pragma GCC unroll 4
                for (int g = 0; g < kGroups; ++g) {
                    const __m256i pairs = _mm256_maddubs_epi16(magnitude[g], _mm256_sign_epi8(a, w[g]));
                    sum[t][g] = _mm256_add_epi32(sum[t][g], _mm256_madd_epi16(pairs, ones));
                    keep_in_chain(sum[t][g]);
                }
            }
        }
    }
}

template <StripFormat kFormat, int kWidth, int kGroups>
KRASIS_INLINE void block_pass(const uint8_t *block, const uint8_t *panel, int pass, float *acc) {
    __m256i sum[kWidth][kGroups];
    block_sums<kFormat, kWidth, kGroups>(block, panel, pass, sum);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
        const int row = group_row<kFormat, kGroups>(pass, g);
        V8 scale = V8::zero();
        if constexpr (kFormat != StripFormat::kRows) {
            scale = load_scales<kFormat>(block + kCodeBytes<kFormat>, row);
        }
#pragma GCC unroll 8
        for (int t = 0; t < kWidth; ++t) {
            __m256 s = broadcast_float(panel + kWidth * 32 + t * 4);
            if constexpr (kFormat != StripFormat::kRows) s = _mm256_mul_ps(scale.v, s);
            float *to = acc + t * 32 + row;
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][g]), s, _mm256_loadu_ps(to)));
        }
    }
}

template <StripFormat kFormat, int kWidth>
void kernel(const StripCall &call) {
    alignas(32) float acc[kWidth * 32];
    for (int i = 0; i < kWidth * 32; i += 8) V8::load(call.acc + i).store(acc + i);
    const uint8_t *block = call.weight, *panel = call.panel, *fetch = call.fetch;
    for (int64_t b = 0; b < call.blocks; ++b) {
        if (call.fetch_lines == 0) {
#pragma GCC unroll 17
            for (int64_t i = 0; i < kBlockBytes<kFormat>; i += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(block + kAheadBytes<kFormat> + i), _MM_HINT_T0);
            }
        } else {
            for (int64_t i = 0; i < call.fetch_lines; ++i, fetch += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(fetch), _MM_HINT_T0);
            }
        }
        if constexpr (kWidth == 1) {
            block_pass<kFormat, kWidth, 4>(block, panel, 0, acc);
        } else {
            block_pass<kFormat, kWidth, 2>(block, panel, 0, acc);
            // Else GCC broadcasts the activations once for both passes and spills them.
            const uint8_t *again = panel;
            __asm__("" : "+r"(again));
            block_pass<kFormat, kWidth, 2>(block, again, 1, acc);
        }
        block += kBlockBytes<kFormat>;
        panel += kWidth * kPanelTokenBytes;
    }
    for (int i = 0; i < kWidth * 32; i += 8) V8::load(acc + i).store(call.acc + i);
}

template <StripFormat kFormat>
constexpr StripKernel kKernels[kPanelTokens] = {kernel<kFormat, 1>, kernel<kFormat, 2>, kernel<kFormat, 3>,
                                                kernel<kFormat, 4>};

}  // namespace

const StripKernel *strip_kernels(StripFormat format) {
    if (format == StripFormat::kQ8) return kKernels<StripFormat::kQ8>;
    if (format == StripFormat::kI4) return kKernels<StripFormat::kI4>;
    if (format == StripFormat::kFp4) return kKernels<StripFormat::kFp4>;
    return kKernels<StripFormat::kRows>;
}

}  // namespace krasis::avx2

#include "../gemm_float.h"
#include "../gemm_groups.h"
#include "../gemm_units.h"
