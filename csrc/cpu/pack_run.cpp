// pack_run.cpp: argument checks and the running of packing tasks, the same for every layout.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "pack.h"

namespace krasis {

int32_t check_source(const krasis_pool *pool, const PackSource &src) {
    if (!pool || !src.data || src.dtype < KRASIS_F32 || src.dtype > KRASIS_F16) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (src.n <= 0 || src.k <= 0 || src.row_stride < src.k) {
        return KRASIS_ERR_ARGUMENT;
    }
    // Bytes of any buffer of these sizes stay far below 2^63.
    const int64_t most = std::numeric_limits<int64_t>::max() / 64;
    if (src.k > int64_t{1} << 40) {
        return KRASIS_ERR_ARGUMENT;
    }
    return src.row_stride > most / src.n ? KRASIS_ERR_ARGUMENT : KRASIS_OK;
}

int32_t check_steps(const float *steps, int64_t count) {
    if (!steps) {
        return KRASIS_ERR_ARGUMENT;
    }
    for (int64_t i = 0; i < count; ++i) {
        if (!std::isfinite(steps[i])) {
            return KRASIS_ERR_ARGUMENT;
        }
    }
    return KRASIS_OK;
}

int32_t normalise_importance(const float *importance, int64_t k, std::vector<float> &out) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) {
        if (!std::isfinite(importance[i]) || importance[i] < 0) {
            return KRASIS_ERR_ARGUMENT;
        }
        largest = importance[i] > largest ? importance[i] : largest;
    }
    if (largest <= 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    try {
        out.resize(static_cast<size_t>(k));
    } catch (const std::bad_alloc &) {
        return KRASIS_ERR_MEMORY;
    }
    for (int64_t i = 0; i < k; ++i) {
        out[static_cast<size_t>(i)] = importance[i] / largest;
    }
    return KRASIS_OK;
}

namespace {

constexpr int64_t kStackK = 128;  // 16 KiB

struct Free {
    void operator()(void *p) const { std::free(p); }
};

int64_t add_partials(const std::vector<PackPartial> &partials, int64_t count, krasis_pack_stats *stats) {
    PackPartial sum;
    for (const PackPartial &partial : partials) {
        if (partial.bad_row >= 0 && (sum.bad_row < 0 || partial.bad_row < sum.bad_row)) {
            sum.bad_row = partial.bad_row;
        }
        sum.squared_error += partial.squared_error;
        sum.squared_sum += partial.squared_sum;
        sum.max_abs_error = partial.max_abs_error > sum.max_abs_error ? partial.max_abs_error : sum.max_abs_error;
    }
    if (stats) {
        stats->nonfinite_row = sum.bad_row;
        if (sum.bad_row < 0) {
            stats->squared_error += sum.squared_error;
            stats->squared_sum += sum.squared_sum;
            stats->max_abs_error = sum.max_abs_error > stats->max_abs_error ? sum.max_abs_error : stats->max_abs_error;
            stats->count += count;
        }
    }
    return sum.bad_row;
}

}  // namespace

int32_t run_pack_tasks(krasis_pool *pool, int64_t num_tasks, int64_t scratch_k, PackTask task, const void *job,
                       int64_t count, krasis_pack_stats *stats) {
    const bool on_stack = scratch_k <= kStackK;  // else one scale a channel: a megabyte a thread
    const int64_t scratch_bytes = ceil_div(scratch_k * kScratchBytesPerK, 4096) * 4096;
    std::unique_ptr<uint8_t, Free> heap;
    std::vector<PackPartial> partials;
    try {
        partials.resize(static_cast<size_t>(num_tasks));
    } catch (const std::bad_alloc &) {
        return KRASIS_ERR_MEMORY;
    }
    if (!on_stack) {
        const size_t all_bytes = static_cast<size_t>(scratch_bytes * krasis_pool_num_threads(pool));
        heap.reset(static_cast<uint8_t *>(std::aligned_alloc(4096, all_bytes)));
        if (!heap) {
            return KRASIS_ERR_MEMORY;
        }
    }
    parallel_for(pool, num_tasks, 1, [&](int64_t begin, int64_t end, int32_t thread) {
        alignas(64) uint8_t stack[kStackK * kScratchBytesPerK];
        uint8_t *const scratch = on_stack ? stack : heap.get() + thread * scratch_bytes;
        for (int64_t i = begin; i < end; ++i) {
            task(job, i, scratch, partials[static_cast<size_t>(i)]);
        }
    });
    return add_partials(partials, count, stats) < 0 ? KRASIS_OK : KRASIS_ERR_NONFINITE;
}

}  // namespace krasis
