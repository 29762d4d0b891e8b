// rows.h: row-wise work on the pool, with small jobs kept on the caller.
#pragma once

#include <cstdint>

#include "pool.h"

namespace krasis {

// Elements that one core handles in a few microseconds: less than this is not worth waking another thread for.
constexpr int64_t kElementsPerPiece = 16384;

// f(begin, end) over rows [0, rows) of row_elements elements each.
template <class F>
void parallel_rows(krasis_pool *pool, int64_t rows, int64_t row_elements, F &&f) {
    if (rows <= 0) return;
    const int64_t grain =
        row_elements < kElementsPerPiece ? kElementsPerPiece / (row_elements > 0 ? row_elements : 1) : 1;
    if (rows < 2 * grain || rows == 1) {
        f(int64_t{0}, rows);
        return;
    }
    parallel_for(pool, rows, grain, [&](int64_t begin, int64_t end, int32_t) { f(begin, end); });
}

}  // namespace krasis
