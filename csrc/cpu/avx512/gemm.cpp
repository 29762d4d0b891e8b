// avx512/gemm.cpp: strip kernels for AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes: codes are made unsigned (int8: xor 0x80 adds 128; int4: stored as u = q
// + 8; E2M1: twice its value + 12, by a table) and the accumulators start at the panel's offset, -128, -8 or -12 times
// the sum of the activations.
#include <cstring>

#include "../gemm_strip.h"
#include "../probe.h"

namespace krasis::avx512 {
namespace {

KRASIS_INLINE int32_t load32(const uint8_t *p) {
    int32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

KRASIS_INLINE float load_float(const uint8_t *p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// A line of 4-bit weights. From memory, with one token, in two halves: a thread then reads 5 % more than by one load
// (Zen 5; why was not found; 8-bit lines gain nothing).
template <bool kFromMemory>
KRASIS_INLINE __m512i load_line(const uint8_t *line) {
    if constexpr (kFromMemory) {
        const auto *halves = reinterpret_cast<const __m256i *>(line);
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(halves)), _mm256_loadu_si256(halves + 1),
                                  1);
    } else {
        return _mm512_loadu_si512(line);
    }
}

// Unsigned codes of 4 k for rows 0-15 and 16-31.
template <StripFormat kFormat, bool kFromMemory>
KRASIS_INLINE void load_codes(const uint8_t *block, int k4, __m512i *w0, __m512i *w1) {
    if constexpr (kFormat == StripFormat::kI4) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i both = load_line<kFromMemory>(block + k4 * 64);
        *w0 = _mm512_and_si512(both, nibble);
        *w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    } else if constexpr (kFormat == StripFormat::kFp4) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i values =
            _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        const __m512i both = load_line<kFromMemory>(block + k4 * 64);
        *w0 = _mm512_shuffle_epi8(values, _mm512_and_si512(both, nibble));
        *w1 = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
    } else {
        const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
        *w0 = _mm512_xor_si512(_mm512_loadu_si512(block + k4 * 128), flip);
        *w1 = _mm512_xor_si512(_mm512_loadu_si512(block + k4 * 128 + 64), flip);
    }
}

// How far ahead of the multiplication a lone stream of weights is fetched. 4-bit blocks go by too fast for any CPU's
// own prefetcher; 8-bit ones are left to it where it is good enough (fetching only some of the lines is worst of all).
// Never a multiple of 4096: loads and prefetches that share their low twelve address bits disturb each other (10 %).
template <StripFormat kFormat>
constexpr int64_t kAheadBytes = (kFourBits<kFormat> ? 12 : 6) * kBlockBytes<kFormat>;

template <StripFormat kFormat>
bool fetches_ahead() {
    return kFourBits<kFormat> || !follows_streams();
}

template <StripFormat kFormat, int kWidth>
void kernel(const StripCall &call) {
    const bool ahead = call.fetch_lines == 0 && fetches_ahead<kFormat>();  // asked before the registers are full
    __m512 acc[kWidth][2];
#pragma GCC unroll 8
    for (int t = 0; t < kWidth; ++t) {
        acc[t][0] = _mm512_loadu_ps(call.acc + t * 32);
        acc[t][1] = _mm512_loadu_ps(call.acc + t * 32 + 16);
    }
    const uint8_t *block = call.weight, *panel = call.panel, *fetch = call.fetch, *next = call.next_panel;
    for (int64_t b = 0; b < call.blocks; ++b) {
        if (ahead) {
#pragma GCC unroll 17
            for (int64_t i = 0; i < kBlockBytes<kFormat>; i += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(block + kAheadBytes<kFormat> + i), _MM_HINT_T0);
            }
        }
        for (int64_t i = 0; i < call.fetch_lines; ++i, fetch += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(fetch), _MM_HINT_T0);
        }
        if constexpr (kWidth > 1) {  // one token: its panel stays in the first-level cache
#pragma GCC unroll 8
            for (int64_t i = 0; i < kWidth * kPanelTokenBytes; i += 64) {
                _mm_prefetch(reinterpret_cast<const char *>(next + i), _MM_HINT_T0);
            }
            next += kWidth * kPanelTokenBytes;
        }
        __m512i sum[kWidth][2];
#pragma GCC unroll 8
        for (int t = 0; t < kWidth; ++t) {
            sum[t][0] = sum[t][1] = _mm512_set1_epi32(load32(panel + kWidth * 36 + t * 4));
        }
#pragma GCC unroll 8
        for (int k4 = 0; k4 < 8; ++k4) {
            __m512i w0, w1;
            load_codes<kFormat, kWidth == 1>(block, k4, &w0, &w1);
#pragma GCC unroll 8
            for (int t = 0; t < kWidth; ++t) {
                const __m512i a = _mm512_set1_epi32(load32(panel + t * 32 + k4 * 4));
                sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, a);
                sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, a);
            }
        }
        V16 scale0, scale1;
        if constexpr (kFormat != StripFormat::kRows) {
            scale0 = load_scales<kFormat>(block + kCodeBytes<kFormat>, 0);
            scale1 = load_scales<kFormat>(block + kCodeBytes<kFormat>, 16);
        }
#pragma GCC unroll 8
        for (int t = 0; t < kWidth; ++t) {
            const __m512 a = _mm512_set1_ps(load_float(panel + kWidth * 32 + t * 4));
            __m512 s0 = a, s1 = a;
            if constexpr (kFormat != StripFormat::kRows) {
                s0 = _mm512_mul_ps(scale0.v, a);
                s1 = _mm512_mul_ps(scale1.v, a);
            }
            acc[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][0]), s0, acc[t][0]);
            acc[t][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][1]), s1, acc[t][1]);
        }
        block += kBlockBytes<kFormat>;
        panel += kWidth * kPanelTokenBytes;
    }
#pragma GCC unroll 8
    for (int t = 0; t < kWidth; ++t) {
        _mm512_storeu_ps(call.acc + t * 32, acc[t][0]);
        _mm512_storeu_ps(call.acc + t * 32 + 16, acc[t][1]);
    }
}

template <StripFormat kFormat>
constexpr StripKernel kKernels[kPanelTokens] = {kernel<kFormat, 1>, kernel<kFormat, 2>, kernel<kFormat, 3>,
                                                kernel<kFormat, 4>, kernel<kFormat, 5>, kernel<kFormat, 6>};

}  // namespace

const StripKernel *strip_kernels(StripFormat format) {
    if (format == StripFormat::kQ8) return kKernels<StripFormat::kQ8>;
    if (format == StripFormat::kI4) return kKernels<StripFormat::kI4>;
    if (format == StripFormat::kFp4) return kKernels<StripFormat::kFp4>;
    return kKernels<StripFormat::kRows>;
}

}  // namespace krasis::avx512

#include "../gemm_float.h"
#include "../gemm_groups.h"
#include "../gemm_units.h"
