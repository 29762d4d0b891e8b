// gemm_strip.h: the strip product per instruction set; only for the files under cpu/avx2, cpu/avx512 and cpu/amx.
#pragma once

#include "gemm.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// Adds `blocks` blocks of one panel to acc [width][32]. Every element is
//   acc = fma(float(sum of q*w over the block), weight_scale * activation_scale, acc)
// (kRows: weight_scale is absent), block after block, whatever the width and the instruction set.
// fetch/fetch_lines: cache lines to prefetch beside each block, the first at fetch, then one after another. Without
// them (0) the weight is taken for a lone stream from memory and is fetched ahead of its use, if that helps this CPU.
// next_panel: what the next call will read, fetched likewise where that measures better (AVX-512: 3 % of MoE prefill;
// AVX2, three times slower, has time enough without).
struct StripCall {
    const uint8_t *weight = nullptr;
    const uint8_t *panel = nullptr;
    float *acc = nullptr;
    int64_t blocks = 0;
    const uint8_t *fetch = nullptr;
    int64_t fetch_lines = 0;
    const uint8_t *next_panel = nullptr;
};
using StripKernel = void (*)(const StripCall &call);

// Tokens of a panel: what keeps the integer sums of 32 (AVX2: 16) rows in registers; of AMX: the rows of a tile.
#if defined(KRASIS_AMX)
constexpr int64_t kPanelTokens = 16;
#elif defined(__AVX512F__)
constexpr int64_t kPanelTokens = 6;
#else
constexpr int64_t kPanelTokens = 4;
#endif
static_assert(kPanelTokens <= kMaxPanelTokens);

template <StripFormat kFormat>
constexpr bool kFourBits = kFormat == StripFormat::kI4 || kFormat == StripFormat::kFp4;
template <StripFormat kFormat>
constexpr int64_t kCodeBytes = kFourBits<kFormat> ? 512 : 1024;
template <StripFormat kFormat>
constexpr int64_t kScaleBytes = kFormat == StripFormat::kRows  ? 0
                                : kFormat == StripFormat::kFp4 ? 32
                                                               : 64;
template <StripFormat kFormat>
constexpr int64_t kBlockBytes = kCodeBytes<kFormat> + kScaleBytes<kFormat>;

#if defined(__AVX512F__)
// Sixteen scales of a block.
template <StripFormat kFormat>
KRASIS_INLINE V16 load_scales(const uint8_t *scales, int64_t first) {
    if constexpr (kFormat == StripFormat::kFp4) {
        const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales + first)));
        const __m512i one = _mm512_set1_epi32(1);
        // 2^(e - 128): the exponent's bits, or below 2^-126 a bit of the mantissa, whose formula is the smaller above.
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
        const __m512i denormal = _mm512_slli_epi32(_mm512_add_epi32(e, one), 21);
        return V16{_mm512_castsi512_ps(_mm512_max_epi32(normal, denormal))};
    } else {
        return V16::load_f16(reinterpret_cast<const uint16_t *>(scales) + first);
    }
}
#endif

// The kernels of a format for widths 1 to kPanelTokens. (AMX has its own.)
const StripKernel *strip_kernels(StripFormat format);

// acc [cut.width summed over panels begin..end][32] = those panels x strip. Weights pass block group after block group,
// so that a group stays in the first-level cache while all panels use it.
void multiply_strip(StripFormat format, const uint8_t *strip, const uint8_t *panels, const PanelCut &cut, int64_t begin,
                    int64_t end, float *acc);

}  // namespace krasis::KRASIS_ISA_NAMESPACE
