// pack_entry.cpp: the packing functions of krasis.h: checks, then tasks for the pool.
#include <algorithm>

#include "pack.h"

using namespace krasis;

int32_t krasis::check_marlin(const MarlinJob &job) {
    const int64_t n = job.src.n, k = job.src.k, group = job.group;
    if (!job.codes || !job.scales || (job.bits != 4 && job.bits != 8) ||
        (job.scale_dtype != KRASIS_BF16 && job.scale_dtype != KRASIS_F16)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if ((group != 32 && group != 64 && group != 128 && group != k) || job.n_offset < 0 || job.n_total < n ||
        job.n_offset > job.n_total - n) {
        return KRASIS_ERR_ARGUMENT;
    }
    const bool fits = k % 16 == 0 && n % kMarlinStrip == 0 && job.n_offset % kMarlinStrip == 0 &&
                      job.n_total % kMarlinStrip == 0 && k % group == 0;
    return fits ? KRASIS_OK : KRASIS_ERR_SHAPE;
}

namespace {

int32_t run_marlin(krasis_pool *pool, MarlinJob &job, krasis_pack_stats *stats) {
    job.chunk_k = job.group >= kTaskColumns ? job.group : kTaskColumns;
    const int64_t num_tasks = (job.src.n / kMarlinStrip) * ceil_div(job.src.k, job.chunk_k);
    const PackTask kernel = choose_kernel<MarlinJob, avx2::pack_marlin, avx512::pack_marlin>(pool);
    return run_pack_tasks(pool, num_tasks, job.group, kernel, &job, job.src.n * job.src.k, stats);
}

}  // namespace

int32_t krasis_pack_marlin(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k, int64_t row_stride,
                           int32_t bits, int64_t group, int64_t n_offset, int64_t n_total, const float *importance,
                           uint32_t *codes, uint16_t *scales, int32_t scale_dtype, krasis_pack_stats *stats) {
    MarlinJob job{{static_cast<const uint8_t *>(src), dtype, row_stride, n, k},
                  bits,
                  scale_dtype,
                  group,
                  n_offset,
                  n_total,
                  0,
                  nullptr,
                  codes,
                  scales,
                  nullptr};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_marlin(job);
    }
    std::vector<float> normalised;
    if (status == KRASIS_OK && importance) {
        status = normalise_importance(importance, k, normalised);
        job.importance = normalised.data();
    }
    return status == KRASIS_OK ? run_marlin(pool, job, stats) : status;
}

int32_t krasis_pack_marlin_steps(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                 int64_t row_stride, int64_t group, int64_t n_offset, int64_t n_total,
                                 const float *steps, uint32_t *codes, uint16_t *scales, int32_t scale_dtype,
                                 krasis_pack_stats *stats) {
    MarlinJob job{{static_cast<const uint8_t *>(src), dtype, row_stride, n, k},
                  4,
                  scale_dtype,
                  group,
                  n_offset,
                  n_total,
                  0,
                  nullptr,
                  codes,
                  scales,
                  steps};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_marlin(job);
    }
    if (status == KRASIS_OK) {
        status = check_steps(steps, n * (k / group));
    }
    return status == KRASIS_OK ? run_marlin(pool, job, stats) : status;
}

int32_t krasis::check_tiles(const TilesJob &job) {
    if (!job.dst) {
        return KRASIS_ERR_ARGUMENT;
    }
    if ((job.part_rows != 16 && job.part_rows != 32) || job.part_offset < 0 || job.part_offset % 16 ||
        job.part_offset > KRASIS_TILE_ROWS - job.part_rows) {
        return KRASIS_ERR_ARGUMENT;
    }
    return job.src.k % KRASIS_BLOCK_K || job.src.n % job.part_rows ? KRASIS_ERR_SHAPE : KRASIS_OK;
}

namespace {

int64_t num_tile_tasks(const TilesJob &job) { return (job.src.n / job.part_rows) * ceil_div(job.src.k, job.chunk_k); }

int32_t run_tiles(krasis_pool *pool, const TilesJob &job, krasis_pack_stats *stats) {
    const PackTask kernel = choose_kernel<TilesJob, avx2::pack_tiles, avx512::pack_tiles>(pool);
    return run_pack_tasks(pool, num_tile_tasks(job), KRASIS_BLOCK_K, kernel, &job, job.src.n * job.src.k, stats);
}

}  // namespace

int32_t krasis_pack_cpu_tiles(krasis_pool *pool, int32_t tiles, const void *src, int32_t dtype, int64_t n, int64_t k,
                              int64_t row_stride, int64_t part_rows, int64_t part_offset, const float *importance,
                              uint8_t *dst, krasis_pack_stats *stats) {
    TilesJob job{{static_cast<const uint8_t *>(src), dtype, row_stride, n, k},
                 tiles,
                 part_rows,
                 part_offset,
                 kTaskColumns,
                 nullptr,
                 dst,
                 nullptr};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_tiles(job);
    }
    if (status == KRASIS_OK && tiles != KRASIS_TILES_Q8 && tiles != KRASIS_TILES_I4) {
        status = KRASIS_ERR_ARGUMENT;
    }
    std::vector<float> normalised;
    if (status == KRASIS_OK && importance) {
        status = normalise_importance(importance, k, normalised);
        job.importance = normalised.data();
    }
    return status == KRASIS_OK ? run_tiles(pool, job, stats) : status;
}

int32_t krasis_pack_cpu_tiles_steps(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                    int64_t row_stride, int64_t part_rows, int64_t part_offset, const float *steps,
                                    uint8_t *dst, krasis_pack_stats *stats) {
    const TilesJob job{{static_cast<const uint8_t *>(src), dtype, row_stride, n, k},
                       KRASIS_TILES_I4,
                       part_rows,
                       part_offset,
                       kTaskColumns,
                       nullptr,
                       dst,
                       steps};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_tiles(job);
    }
    if (status == KRASIS_OK) {
        status = check_steps(steps, n * (k / KRASIS_BLOCK_K));
    }
    return status == KRASIS_OK ? run_tiles(pool, job, stats) : status;
}

int32_t krasis_pack_cpu_tiles_from_q8_0(krasis_pool *pool, const void *src, int64_t n, int64_t k, int64_t part_rows,
                                        int64_t part_offset, uint8_t *dst, krasis_pack_stats *stats) {
    TilesJob job{{static_cast<const uint8_t *>(src), KRASIS_F32, k, n, k},
                 KRASIS_TILES_Q8,
                 part_rows,
                 part_offset,
                 kTaskColumns,
                 nullptr,
                 dst,
                 nullptr};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_tiles(job);
    }
    if (status != KRASIS_OK) {
        return status;
    }
    const PackTask kernel = choose_kernel<TilesJob, avx2::pack_tiles_from_q8_0, avx512::pack_tiles_from_q8_0>(pool);
    return run_pack_tasks(pool, num_tile_tasks(job), KRASIS_BLOCK_K, kernel, &job, n * k, stats);
}

int32_t krasis_pack_cpu_tiles_from_mxfp4(krasis_pool *pool, const void *src, int64_t n, int64_t k, int64_t part_rows,
                                         int64_t part_offset, uint8_t *dst, krasis_pack_stats *stats) {
    TilesJob job{{static_cast<const uint8_t *>(src), KRASIS_F32, k, n, k},
                 KRASIS_TILES_MXFP4,
                 part_rows,
                 part_offset,
                 kTaskColumns,
                 nullptr,
                 dst,
                 nullptr};
    int32_t status = check_source(pool, job.src);
    if (status == KRASIS_OK) {
        status = check_tiles(job);
    }
    if (status != KRASIS_OK) {
        return status;
    }
    const PackTask kernel = [](const void *any, int64_t task, uint8_t *, PackPartial &out) {
        pack_tiles_from_mxfp4(*static_cast<const TilesJob *>(any), task, out);
    };
    return run_pack_tasks(pool, num_tile_tasks(job), KRASIS_BLOCK_K, kernel, &job, n * k, stats);
}

int32_t krasis_pack_marlin_from_mxfp4(krasis_pool *pool, const void *src, int64_t n, int64_t k, int64_t n_offset,
                                      int64_t n_total, uint32_t *codes, uint8_t *scales, krasis_pack_stats *stats) {
    const MarlinMxfp4Job job{
        {static_cast<const uint8_t *>(src), KRASIS_F32, k, n, k}, n_offset, n_total, codes, scales};
    const int32_t status = check_source(pool, job.src);
    if (status != KRASIS_OK) {
        return status;
    }
    if (!codes || !scales || n_offset < 0 || n_total < n || n_offset > n_total - n) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (k % 64 || n % kMarlinStrip || n_offset % kMarlinStrip || n_total % kMarlinStrip) {
        return KRASIS_ERR_SHAPE;
    }
    const PackTask kernel = [](const void *any, int64_t task, uint8_t *, PackPartial &out) {
        pack_marlin_from_mxfp4(*static_cast<const MarlinMxfp4Job *>(any), task, out);
    };
    return run_pack_tasks(pool, n / kMarlinStrip, KRASIS_BLOCK_K, kernel, &job, n * k, stats);
}

int32_t krasis_pack_int8_rows(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                              int64_t row_stride, int8_t *dst, float *scales, krasis_pack_stats *stats) {
    const RowsJob job{{static_cast<const uint8_t *>(src), dtype, row_stride, n, k}, dst, scales};
    const int32_t status = check_source(pool, job.src);
    if (status != KRASIS_OK) {
        return status;
    }
    if (!dst || !scales) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (n % KRASIS_TILE_ROWS || k % KRASIS_BLOCK_K) {
        return KRASIS_ERR_SHAPE;
    }
    const PackTask kernel = choose_kernel<RowsJob, avx2::pack_int8_rows, avx512::pack_int8_rows>(pool);
    return run_pack_tasks(pool, n / KRASIS_TILE_ROWS, KRASIS_BLOCK_K, kernel, &job, n * k, stats);
}
