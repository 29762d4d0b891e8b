// gemm_groups.h: a strip times panels by strip kernels. Included once by cpu/avx2/gemm.cpp and once by
// cpu/avx512/gemm.cpp; cpu/amx/gemm.cpp has its own.
#pragma once

#include "gemm_strip.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// Bytes of weights that stay in the first-level cache while the panels pass (it is 32 KiB or more, and holds a piece of
// the activations besides).
constexpr int64_t kGroupBytes = 16 * 1024;
constexpr int64_t kLineBytes = 64;

void multiply_strip(StripFormat format, const uint8_t *strip, const uint8_t *panels, const PanelCut &cut, int64_t begin,
                    int64_t end, float *acc) {
    const int64_t block_bytes = strip_block_bytes(format);
    const int64_t num_panels = end - begin;
    const int64_t most = num_panels == 1 ? cut.blocks : std::max<int64_t>(kGroupBytes / block_bytes, 1);
    const int64_t num_groups = (cut.blocks + most - 1) / most;
    const int64_t group = (cut.blocks + num_groups - 1) / num_groups;
    const int64_t first_token = cut.first(begin);
    const int64_t block_lines = (block_bytes + kLineBytes - 1) / kLineBytes;
    const int64_t lines = (block_lines + num_panels - 1) / num_panels;
    const StripKernel *kernels = strip_kernels(format);
    const int64_t end_token = end < cut.count ? cut.first(end) : cut.tokens;
    std::fill_n(acc, (end_token - first_token) * kStripRows, 0.0f);
    for (int64_t b = 0; b < cut.blocks; b += group) {
        StripCall call;
        call.blocks = std::min(group, cut.blocks - b);
        call.weight = strip + b * block_bytes;
        for (int64_t p = begin; p < end; ++p) {
            const int64_t width = cut.width(p);
            call.panel = panels + cut.offset_bytes(p) + b * width * kPanelTokenBytes;
            const int64_t next = p + 1 < end ? p + 1 : begin;  // after the last panel: the first, next group
            const int64_t next_block = p + 1 < end ? b : b + group < cut.blocks ? b + group : 0;
            call.next_panel = panels + cut.offset_bytes(next) + next_block * cut.width(next) * kPanelTokenBytes;
            call.acc = acc + (cut.first(p) - first_token) * kStripRows;
            if (num_panels > 1) {  // each panel fetches its share of the next group
                call.fetch = call.weight + group * block_bytes + (p - begin) * lines * group * kLineBytes;
                call.fetch_lines = lines;
            }
            kernels[width - 1](call);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
