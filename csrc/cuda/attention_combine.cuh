// attention_combine.cuh: the splits of attention_decode.cuh added up, in the order of their numbers.
#pragma once

#include "attention_decode.cuh"

namespace krasis::cuda {

inline constexpr int kCombineThreads = 512;

// One block a head of a row: adds up the splits, several at a time. A lane of each warp keeps the weights of two
// splits. shared: float [splits at a time][kDim].
template <class Type, int kDim>
KRASIS_KERNEL(kCombineThreads, 1)
attention_combine_kernel(const AttentionParams p) {
    simt::follow();
    static_assert(kMaxSplits == 64);
    constexpr int kAtOnce = kCombineThreads / kDim;
    const int row = static_cast<int>(simt::block_x()) / p.num_heads;
    const int head = static_cast<int>(simt::block_x()) % p.num_heads;
    const Keys visible = visible_keys(p, row);
    const int splits = active_splits(visible.end - visible.begin, p.splits);
    if (splits <= 1) return;
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32;
    const int64_t first = static_cast<int64_t>(simt::block_x()) * p.splits;
    float weights[2], highest = kLowest, total = 0;
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        weights[i] = lane + 32 * i < splits ? p.statistics[(first + lane + 32 * i) * kStatistics] : kLowest;
        highest = weights[i] > highest ? weights[i] : highest;
    }
    KRASIS_UNROLL
    for (int distance = 16; distance; distance /= 2) {
        const float other = simt::shuffle_xor(highest, distance);
        highest = other > highest ? other : highest;
    }
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        weights[i] = weight_below(weights[i], highest);
        if (lane + 32 * i < splits) total += weights[i] * p.statistics[(first + lane + 32 * i) * kStatistics + 1];
    }
    KRASIS_UNROLL
    for (int distance = 16; distance; distance /= 2) total += simt::shuffle_xor(total, distance);
    if (p.sinks) total += simt::exp_float(p.sinks[head] - highest);
    const int column = thread % kDim, group = thread / kDim;
    const bool exists = column < p.head_dim;
    const float *parts = p.sums + first * p.head_dim + column;
    float value = 0;
    KRASIS_UNROLL_BY(8)
    for (int begin = 0; begin < splits; begin += kAtOnce) {  // the same for all lanes of a warp: they shuffle
        const int split = begin + group, known = split < splits ? split : 0;
        const float weight = simt::shuffle(known < 32 ? weights[0] : weights[1], known % 32);
        if (exists && split < splits) {
            value = simt::fused_multiply_add(weight, parts[static_cast<int64_t>(split) * p.head_dim], value);
        }
    }
    auto *values = reinterpret_cast<float *>(simt::shared_memory());
    simt::shared_store(values + thread, value);
    simt::sync_threads();
    if (group || !exists) return;
    KRASIS_UNROLL
    for (int i = 1; i < kAtOnce; ++i) value += simt::shared_load<float>(values + i * kDim + column);
    auto *to = reinterpret_cast<uint16_t *>(p.out + row * p.out_stride);
    to[static_cast<int64_t>(head) * p.head_dim + column] = Type::from_float(value / total);
}

}  // namespace krasis::cuda
