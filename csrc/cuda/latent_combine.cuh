// latent_combine.cuh: the splits of latent_attention.cuh added up, in the order of their numbers.
#pragma once

#include "latent_attention.cuh"

namespace krasis::cuda {

inline constexpr int kLatentCombineThreads = 128;
static_assert(kLatentMaxSplits <= kLatentCombineThreads);  // a thread keeps one weight

// One block a head of a row: adds up its splits in the order of their numbers. shared: float [splits].
template <class Type>
KRASIS_KERNEL(kLatentCombineThreads, 1)
latent_combine_kernel(const LatentParams p) {
    const int64_t head = simt::block_x();  // among the queries of all rows
    const int thread = static_cast<int>(simt::thread_x());
    const int keys = latent_tile_keys(p, latent_queries(p, latent_tile(p, head)));
    const int splits = latent_active_splits(keys, p.splits);
    if (splits <= 1) return;
    const float *statistics = p.statistics + head * p.splits * kLatentStatistics;
    float highest = kNothing, total = 0;
    for (int s = 0; s < splits; ++s) {
        const float other = statistics[s * kLatentStatistics];
        highest = other > highest ? other : highest;
    }
    auto *weights = reinterpret_cast<float *>(simt::shared_memory());
    for (int s = 0; s < splits; ++s) {
        const float weight = below(statistics[s * kLatentStatistics], highest);
        total = simt::fused_multiply_add(weight, statistics[s * kLatentStatistics + 1], total);
        if (thread == s) simt::shared_store(weights + s, weight);
    }
    simt::sync_threads();
    const float *sums = p.sums + head * p.splits * p.kv_rank;
    auto *to = reinterpret_cast<uint16_t *>(p.out) + head * p.kv_rank;
    for (int column = thread; column < p.kv_rank; column += kLatentCombineThreads) {
        float value = 0;
        KRASIS_UNROLL_BY(8)
        for (int s = 0; s < splits; ++s) {
            value = simt::fused_multiply_add(simt::shared_load<float>(weights + s),
                                             sums[static_cast<int64_t>(s) * p.kv_rank + column], value);
        }
        to[column] = Type::from_float(value / total);
    }
}

}  // namespace krasis::cuda
