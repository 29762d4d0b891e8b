// pack.h: what the packers' argument checks (pack*.cpp) and their kernels (avx2/pack.cpp, avx512/pack.cpp) share.
//
// A packing is cut into tasks whose number and extent depend on the shapes alone; each leaves a PackPartial, and the
// partials are added in task order, so that neither bytes nor statistics depend on the number of threads. Kernels keep
// one weight row in one vector lane: nothing is summed across lanes, and both instruction sets give the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "../krasis.h"
#include "pool.h"

namespace krasis {

// Weights [n, k] of a krasis_dtype, rows row_stride elements apart.
struct PackSource {
    const uint8_t *data;
    int32_t dtype;
    int64_t row_stride, n, k;
};

// One task's statistics. bad_row: the first row with a NaN, an infinity or a weight no scale can hold; -1: none.
struct PackPartial {
    double squared_error = 0, squared_sum = 0, max_abs_error = 0;
    int64_t bad_row = -1;
};

struct MarlinJob {
    PackSource src;
    int32_t bits, scale_dtype;
    int64_t group, n_offset, n_total;
    int64_t chunk_k;          // columns of k in one task: a multiple of group
    const float *importance;  // [k] in 0..1, or null
    uint32_t *codes;
    uint16_t *scales;
    const float *steps;  // [n, k / group], the scales of 4 bits if they are given, or null
};

struct MarlinMxfp4Job {
    PackSource src;  // data are blocks, dtype and row_stride unused
    int64_t n_offset, n_total;
    uint32_t *codes;
    uint8_t *scales;
};

struct TilesJob {
    PackSource src;  // of Q8_0: data are blocks, dtype and row_stride unused
    int32_t tiles;
    int64_t part_rows, part_offset;
    int64_t chunk_k;
    const float *importance;
    uint8_t *dst;
    const float *steps;  // as above, [n, k / 32], of I4
};

struct RowsJob {
    PackSource src;
    int8_t *dst;
    float *scales;
};

// A task's working memory: [scratch_k][16] floats, then [scratch_k][64] codes. 64-byte aligned.
constexpr int64_t kScratchBytesPerK = 16 * 4 + 64;
constexpr int64_t kMarlinStrip = 64;   // rows of src in one Marlin task
constexpr int64_t kTaskColumns = 512;  // columns in one task, unless a group is longer

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define KRASIS_PACK_KERNELS                                                                    \
    void pack_marlin(const MarlinJob &job, int64_t task, uint8_t *scratch, PackPartial &out);  \
    void pack_tiles(const TilesJob &job, int64_t task, uint8_t *scratch, PackPartial &out);    \
    void pack_tiles_from_q8_0(const TilesJob &job, int64_t task, uint8_t *, PackPartial &out); \
    void pack_int8_rows(const RowsJob &job, int64_t task, uint8_t *scratch, PackPartial &out);

namespace avx2 {
KRASIS_PACK_KERNELS
}
namespace avx512 {
KRASIS_PACK_KERNELS
}

// From MXFP4 blocks; the same for both instruction sets: words are copied, nothing is computed.
void pack_tiles_from_mxfp4(const TilesJob &job, int64_t task, PackPartial &out);
void pack_marlin_from_mxfp4(const MarlinMxfp4Job &job, int64_t task, PackPartial &out);

// ---- checks and running, shared by the entry points ------------------------------------------------------------

// KRASIS_OK, or why the source cannot be packed: null, unknown dtype, sizes that are not positive or overflow.
int32_t check_source(const krasis_pool *pool, const PackSource &src);

// The same of the Marlin weight that a job writes.
int32_t check_marlin(const MarlinJob &job);

// The same of the tiles that a job writes.
int32_t check_tiles(const TilesJob &job);

// ARGUMENT unless there are scales, all finite. count: of them.
int32_t check_steps(const float *steps, int64_t count);

// Divides importance by its largest entry. ARGUMENT if any is negative or not finite, or none is positive.
int32_t normalise_importance(const float *importance, int64_t k, std::vector<float> &out);

using PackTask = void (*)(const void *job, int64_t task, uint8_t *scratch, PackPartial &out);

// Runs the tasks and adds their statistics to *stats (may be null). scratch_k: see kScratchBytesPerK.
int32_t run_pack_tasks(krasis_pool *pool, int64_t num_tasks, int64_t scratch_k, PackTask task, const void *job,
                       int64_t count, krasis_pack_stats *stats);

// Picks the kernel of the pool's instruction set for run_pack_tasks.
template <class Job, void (*Avx2)(const Job &, int64_t, uint8_t *, PackPartial &),
          void (*Avx512)(const Job &, int64_t, uint8_t *, PackPartial &)>
PackTask choose_kernel(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        return [](const void *job, int64_t task, uint8_t *scratch, PackPartial &out) {
            Avx512(*static_cast<const Job *>(job), task, scratch, out);
        };
    }
    return [](const void *job, int64_t task, uint8_t *scratch, PackPartial &out) {
        Avx2(*static_cast<const Job *>(job), task, scratch, out);
    };
}

}  // namespace krasis
