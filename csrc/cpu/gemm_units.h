// gemm_units.h: what every instruction set does with its strip product. Included once by the gemm.cpp of cpu/avx2,
// cpu/avx512 and cpu/amx.
#pragma once

#include "gemm_strip.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

int64_t panel_tokens() { return kPanelTokens; }

void gemm_rows_unit(const RowsUnit &unit) {
    constexpr int64_t kPanelsAtOnce = 8;
    alignas(64) float acc[kPanelsAtOnce * kPanelTokens * kStripRows];
    const V16 scale0 = V16::load(unit.row_scale), scale1 = V16::load(unit.row_scale + 16);
    for (int64_t p = unit.first_panel; p < unit.end_panel; p += kPanelsAtOnce) {
        const int64_t end = std::min(p + kPanelsAtOnce, unit.end_panel);
        multiply_strip(StripFormat::kRows, unit.strip, unit.panels, unit.cut, p, end, acc);
        const int64_t first = unit.cut.first(p);
        const int64_t tokens = (end < unit.cut.count ? unit.cut.first(end) : unit.cut.tokens) - first;
        for (int64_t t = 0; t < tokens; ++t) {
            float *out = unit.out + (first + t) * unit.ldo;
            V16 low_rows = mul(V16::load(acc + t * kStripRows), scale0);
            V16 high_rows = mul(V16::load(acc + t * kStripRows + 16), scale1);
            if (unit.accumulate) {
                low_rows = add(V16::load(out), low_rows);
                high_rows = add(V16::load(out + 16), high_rows);
            }
            low_rows.store(out);
            high_rows.store(out + 16);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
