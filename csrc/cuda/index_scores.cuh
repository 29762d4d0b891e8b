// index_scores.cuh: scores of an index over tokens, by tensor cores: 16 keys a warp against eight heads at a time.
//
// A product adds up channels in any order: a lane takes eight consecutive ones of a key, and of a head, as its pairs of
// two steps, so that both come with one load of 16 bytes. Queries are the sum of two 16-bit floats.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kScoreWarps = 8, kScoreThreads = 32 * kScoreWarps;
inline constexpr int kScoreKeys = 16 * kScoreWarps;  // of a block at a time
inline constexpr int kScoreBlockKeys = 4 * kScoreKeys;
inline constexpr int kScoreNumbers = 8192;  // of queries in shared memory

// How many keys a row sees; a position outside of the cache counts as its nearest end.
KRASIS_DEVICE int index_keys(const krasis_cuda_choose_args &p, int64_t row) {
    const int64_t position = p.rows ? p.rows[row].position : p.start + row;
    return static_cast<int>(position < 0 ? 0 : position < p.capacity ? position + 1 : p.capacity);
}

template <class Type_, int kDim_>
struct ScoreTile {
    using Type = Type_;
    static constexpr int kDim = kDim_, kGroups = kDim / 32;  // channels, rounded up; groups of two steps
    static constexpr int kTiles = kScoreNumbers / (8 * kDim), kHeads = 8 * kTiles;  // at a time
    static constexpr int kRestAt = 2 * kScoreNumbers, kWeightsAt = 2 * kRestAt;     // in bytes
    static constexpr int kSharedBytes = kWeightsAt + 4 * kHeads;
};

template <class Tile>
struct ScoreWorker {
    using Type = typename Tile::Type;
    const krasis_cuda_choose_args &p;
    uint8_t *shared;
    int64_t row;
    int thread, lane, warp, groups;
    const uint8_t *keys;
    simt::Words4 own[2][Tile::kGroups];  // of keys lane / 4 and lane / 4 + 8

    KRASIS_DEVICE ScoreWorker(const krasis_cuda_choose_args &args, int64_t own_row)
        : p(args), shared(simt::shared_memory()), row(own_row) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        warp = thread / 32;
        groups = static_cast<int>((p.dim + 31) / 32);
        keys = static_cast<const uint8_t *>(p.cache);
        if (p.rows) keys = static_cast<const uint8_t *>(p.rows[row].values) + p.values_offset;
    }

    // Some heads' queries, each lane's eight channels together, and their weights; zeros past the last.
    KRASIS_DEVICE void load_heads(int64_t first) const {
        const float *q = p.q + (row * p.heads + first) * p.dim;
        for (int cell = thread; cell < Tile::kTiles * Tile::kGroups * 32; cell += kScoreThreads) {
            const int of = cell % 32, group = cell / 32 % Tile::kGroups, tile = cell / 32 / Tile::kGroups;
            const int head = 8 * tile + of / 4, channel = 32 * group + of % 4 * 8;
            const bool valid = first + head < p.heads && channel < p.dim;
            simt::Words4 values, rest;
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float low = valid ? q[head * p.dim + channel + 2 * i] : 0.0f;
                const float high = valid ? q[head * p.dim + channel + 2 * i + 1] : 0.0f;
                values.w[i] = pack2<Type>(low, high);
                rest.w[i] = pack2<Type>(low - Type::to_float(static_cast<uint16_t>(values.w[i])),
                                        high - Type::to_float(static_cast<uint16_t>(values.w[i] >> 16)));
            }
            simt::shared_store(shared + 16 * cell, values);
            simt::shared_store(shared + Tile::kRestAt + 16 * cell, rest);
        }
        for (int head = thread; head < Tile::kHeads; head += kScoreThreads) {
            const float weight = first + head < p.heads ? p.weights[row * p.heads + first + head] : 0.0f;
            simt::shared_store(shared + Tile::kWeightsAt + 4 * head, weight);
        }
    }

    // The warp's 16 keys from first on; zeros from count on.
    KRASIS_DEVICE void load_keys(int first, int count) {
        KRASIS_UNROLL
        for (int low = 0; low < 2; ++low) {
            const int key = first + lane / 4 + 8 * low;
            KRASIS_UNROLL
            for (int group = 0; group < Tile::kGroups; ++group) {
                const int channel = 32 * group + lane % 4 * 8;
                own[low][group] = simt::Words4{};
                if (key >= count || channel >= p.dim) continue;
                own[low][group] =
                    *reinterpret_cast<const simt::Words4 *>(keys + (static_cast<int64_t>(key) * p.dim + channel) * 2);
            }
        }
    }

    // Adds what the heads in shared memory give for the warp's keys: this lane's two heads of each eight.
    KRASIS_DEVICE void add_heads(float (&total)[2]) const {
        for (int tile = 0; tile < Tile::kTiles; ++tile) {
            float d[4] = {0, 0, 0, 0};
            KRASIS_UNROLL
            for (int group = 0; group < Tile::kGroups; ++group) {
                if (group >= groups) continue;  // the whole block
                const uint8_t *at = shared + 16 * ((tile * Tile::kGroups + group) * 32 + lane);
                const auto values = simt::shared_load<simt::Words4>(at);
                const auto rest = simt::shared_load<simt::Words4>(at + Tile::kRestAt);
                const simt::Words4 &a = own[0][group], &b = own[1][group];
                KRASIS_UNROLL
                for (int step = 0; step < 2; ++step) {
                    const uint32_t rows[4] = {a.w[2 * step], b.w[2 * step], a.w[2 * step + 1], b.w[2 * step + 1]};
                    simt::mma(Type{}, d, rows, {values.w[2 * step], values.w[2 * step + 1]});
                    simt::mma(Type{}, d, rows, {rest.w[2 * step], rest.w[2 * step + 1]});
                }
            }
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int head = 8 * tile + lane % 4 * 2 + i % 2;
                const float weight = simt::shared_load<float>(shared + Tile::kWeightsAt + 4 * head);
                total[i / 2] = simt::fused_multiply_add(weight, d[i] > 0.0f ? d[i] : 0.0f, total[i / 2]);
            }
        }
    }

    KRASIS_DEVICE void run(int begin, int count) {
        float *scores = p.scores + row * p.score_columns;
        for (int from = begin; from < begin + kScoreBlockKeys && from < count; from += kScoreKeys) {
            const int first = from + 16 * warp;
            float total[2] = {0, 0};
            load_keys(first, count);
            for (int64_t head = 0; head < p.heads; head += Tile::kHeads) {
                if (from == begin || p.heads > Tile::kHeads) {
                    simt::sync_threads();  // the last ones have been used
                    load_heads(head);
                    simt::sync_threads();
                }
                add_heads(total);
            }
            KRASIS_UNROLL
            for (int low = 0; low < 2; ++low) {
                total[low] += simt::shuffle_xor(total[low], 1);
                total[low] += simt::shuffle_xor(total[low], 2);
                const int key = first + lane / 4 + 8 * low;
                if (lane % 4 == 0 && key < count) scores[key] = total[low];
            }
        }
    }
};

// Blocks: [row][kScoreBlockKeys keys]. Rows that see no more than their budget need no scores.
template <class Type, int kDim>
KRASIS_KERNEL(kScoreThreads, 1)
index_scores_kernel(const krasis_cuda_choose_args p) {
    const int64_t blocks = (p.score_columns + kScoreBlockKeys - 1) / kScoreBlockKeys;
    const int64_t row = simt::block_x() / blocks;
    const int begin = static_cast<int>(simt::block_x() % blocks) * kScoreBlockKeys, count = index_keys(p, row);
    if (count <= p.budget || begin >= count) return;
    ScoreWorker<ScoreTile<Type, kDim>> worker(p, row);
    worker.run(begin, count);
}

}  // namespace krasis::cuda
