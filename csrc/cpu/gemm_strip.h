// gemm_strip.h: the strip product per instruction set; only for the files under cpu/avx2 and cpu/avx512.
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

// Tokens of a panel: what keeps the integer sums of 32 (AVX2: 16) rows in registers.
#if defined(__AVX512F__)
constexpr int64_t kPanelTokens = 6;
#else
constexpr int64_t kPanelTokens = 4;
#endif
static_assert(kPanelTokens <= kMaxPanelTokens);

// The kernels of a format for widths 1 to kPanelTokens.
const StripKernel *strip_kernels(StripFormat format);

// acc [cut.width summed over panels begin..end][32] = those panels x strip. Weights pass block group after block group,
// so that a group stays in the first-level cache while all panels use it.
void multiply_strip(StripFormat format, const uint8_t *strip, const uint8_t *panels, const PanelCut &cut, int64_t begin,
                    int64_t end, float *acc);

}  // namespace krasis::KRASIS_ISA_NAMESPACE
