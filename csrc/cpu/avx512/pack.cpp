// pack.cpp: the packing tasks for this instruction set.
#include "../pack_tasks.h"

namespace krasis::avx512 {

void pack_marlin(const MarlinJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    marlin_task(job, task, scratch, out);
}

void pack_tiles(const TilesJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    tiles_task(job, task, scratch, out);
}

void pack_tiles_from_q8_0(const TilesJob &job, int64_t task, uint8_t *, PackPartial &out) { q8_0_task(job, task, out); }

void pack_int8_rows(const RowsJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    int8_rows_task(job, task, scratch, out);
}

}  // namespace krasis::avx512
