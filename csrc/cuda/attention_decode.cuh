// attention_decode.cuh: attention of few queries, each over its own cache, the keys split over blocks ("flash
// decoding").
//
// A block takes up to 16 query heads that share a key/value head, so that keys and values are read once, and one split
// of the keys, in stages of 16 keys a warp through a ring of cp.async. A warp keeps its own running maximum, sum and
// output; the warps of a block, and then the splits of a head, are combined in the order of their numbers. Keys are
// dealt to splits by the position, which the kernel reads from device memory: the grid depends on the capacity alone.
//
// Products run as m16n8k16 with the heads as rows. The probabilities go in as the sum of two 16-bit floats, the value
// and what its rounding left, so that rounding them costs no accuracy.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kMaxSplits = 64, kHeads = 16, kMaxHeadDim = 512;
inline constexpr int kSplitKeys = 64;  // a split has a multiple of so many keys
inline constexpr int kStatistics = 2;  // of a split of a head: the maximum, and the sum of exponentials below it

struct AttentionParams {
    const uint8_t *q, *keys, *values;  // 16-bit
    uint8_t *out;
    const int64_t *position;      // of the only row, if rows is null
    const krasis_cuda_row *rows;  // [num_rows]
    const float *sinks;           // [num_heads] or null
    float *sums;                  // [num_rows, num_heads, splits, head_dim]
    float *statistics;            // [num_rows, num_heads, splits, 2]
    // In bytes.
    int64_t keys_offset, values_offset, q_stride, out_stride;
    int32_t capacity, num_heads, heads_per_kv, head_tiles, head_dim, splits, window;
    int32_t blocks_per_row;
    float scale;
};

struct Keys {
    int begin, end;
};

// The keys that a row's query sees; a position outside of the cache counts as its nearest end.
KRASIS_DEVICE Keys visible_keys(const AttentionParams &p, int64_t row) {
    const int64_t position = p.rows ? p.rows[row].position : *p.position;
    const int end = position < 0 ? 0 : position < p.capacity ? static_cast<int>(position) + 1 : p.capacity;
    return {p.window && end > p.window ? end - p.window : 0, end};
}

KRASIS_DEVICE int keys_per_split(int count, int splits) { return ((count - 1) / splits / kSplitKeys + 1) * kSplitKeys; }

KRASIS_DEVICE int active_splits(int count, int splits) {
    return count == 0 ? 0 : (count - 1) / keys_per_split(count, splits) + 1;
}

// Empty for splits that have nothing to do.
KRASIS_DEVICE Keys keys_of(int split, int count, int splits) {
    if (count == 0) return {0, 0};
    const int each = keys_per_split(count, splits), begin = split * each;
    return {begin, begin + each < count ? begin + each : count};
}

inline constexpr float kLowest = -__builtin_inff();

// exp(x - maximum), where the maximum of nothing is kLowest.
KRASIS_DEVICE float weight_below(float x, float maximum) { return x == kLowest ? 0.0f : simt::exp_float(x - maximum); }

template <class Type_, int kDim_>
struct AttentionTile {
    using Type = Type_;
    static constexpr int kDim = kDim_;  // head_dim, rounded up; the rest is zeros
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    // A warp has the registers for sums of 128 columns.
    static constexpr int kParts = kDim > 128 ? kDim / 128 : 1, kPartColumns = kDim / kParts;
    static constexpr int kKeyWarps = kWarps / kParts, kKeys = 16 * kKeyWarps;  // of a stage
    static constexpr int kStages = 3;
    static constexpr int kRowBytes = 2 * kDim, kRowChunks = kRowBytes / 16;
    static constexpr int kHalfBytes = kKeys * kRowBytes;           // keys, then values
    static constexpr int kSharedBytes = kStages * 2 * kHalfBytes;  // at most 96 KiB: what every target has
    static_assert(kSplitKeys % kKeys == 0);
    // What the warps leave for each other lies where the ring was: [key warp][head] rows of sums, so far apart that
    // neither stores nor loads meet in a bank; maxima and sums of exponentials, [key warp][head][2]; and each key
    // warp's weight, [head][key warp], beside the sum of a head.
    static constexpr int kSumFloats = kDim + 8;
    static constexpr int kStatisticsAt = kKeyWarps * kHeads * kSumFloats;
    static constexpr int kWeightsAt = kStatisticsAt + kKeyWarps * kHeads * kStatistics;
    static constexpr int kTotalsAt = kWeightsAt + kKeyWarps * kHeads;
    static_assert((kTotalsAt + kHeads) * 4 <= kSharedBytes);
};

template <class Tile>
struct AttentionWorker {
    using Type = typename Tile::Type;
    static constexpr int kSteps = Tile::kDim / 16;  // along the head, 16 at a time
    static constexpr int kPartSteps = kSteps / Tile::kParts;
    static constexpr bool kHoldsQ = Tile::kDim <= 256;  // there are registers for no more: it is read again each stage

    const AttentionParams &p;
    uint8_t *shared;
    int thread, lane, key_warp, part;
    int first_head, num_heads;  // of this block
    int64_t batch_row;
    const uint8_t *query;
    const uint8_t *keys, *values;  // of this key/value head
    Keys range;
    uint32_t q[kHoldsQ ? kSteps : 1][4];
    float out[2 * kPartSteps][4];  // [8 columns][fragment], unscaled
    float maximum[2], sum[2];      // of rows lane / 4 and lane / 4 + 8; sum: of this lane's keys

    KRASIS_DEVICE AttentionWorker(const AttentionParams &params, int64_t own_row, int head_block, const Keys &own)
        : p(params), shared(simt::shared_memory()), batch_row(own_row), range(own) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        key_warp = thread / 32 / Tile::kParts;
        part = thread / 32 % Tile::kParts;
        const int kv_head = head_block / p.head_tiles, tile = head_block % p.head_tiles;
        first_head = kv_head * p.heads_per_kv + tile * kHeads;
        num_heads = p.heads_per_kv - tile * kHeads;
        const int64_t offset = static_cast<int64_t>(kv_head) * p.capacity * p.head_dim * 2;
        query = p.q + batch_row * p.q_stride;
        keys = offset + (p.rows ? static_cast<const uint8_t *>(p.rows[batch_row].keys) + p.keys_offset : p.keys);
        values =
            offset + (p.rows ? static_cast<const uint8_t *>(p.rows[batch_row].values) + p.values_offset : p.values);
        KRASIS_UNROLL
        for (int i = 0; i < 8 * kPartSteps; ++i) out[i / 4][i % 4] = 0;
        maximum[0] = maximum[1] = kLowest;
        sum[0] = sum[1] = 0;
    }

    // The query as fragments; heads and columns past the last are zeros.
    KRASIS_DEVICE void load_q_step(int step, uint32_t (&to)[4]) const {
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int head = lane / 4 + 8 * (i % 2), column = 16 * step + 8 * (i / 2) + 2 * (lane % 4);
            const uint8_t *at = query + (static_cast<int64_t>(first_head + head) * p.head_dim + column) * 2;
            const bool exists = head < num_heads && column < p.head_dim;
            to[i] = exists ? *reinterpret_cast<const uint32_t *>(at) : 0;
        }
    }

    KRASIS_DEVICE void load_q() {
        if constexpr (kHoldsQ) {
            KRASIS_UNROLL
            for (int step = 0; step < kSteps; ++step) load_q_step(step, q[step]);
        }
    }

    KRASIS_DEVICE uint8_t *stage(int index) const { return shared + index % Tile::kStages * 2 * Tile::kHalfBytes; }

    // Eight rows in a row of chunks must fall into different banks.
    KRASIS_DEVICE static int place(int row, int chunk) { return row * Tile::kRowBytes + (chunk ^ row % 8) * 16; }

    // Starts the copies of a stage, or of nothing past the last; one group either way. Keys past the end are zeros.
    KRASIS_DEVICE void load(int index) {
        const int first = range.begin + index * Tile::kKeys;
        if (first < range.end) {
            constexpr int kRowsAtOnce = Tile::kThreads / Tile::kRowChunks;
            const int row = thread / Tile::kRowChunks, chunk = thread % Tile::kRowChunks;
            const int left = chunk * 8 < p.head_dim ? range.end - first : 0;
            int64_t offset = static_cast<int64_t>(first + row) * p.head_dim * 2 + chunk * 16;
            KRASIS_UNROLL_BY(4)
            for (int i = 0; i < Tile::kKeys; i += kRowsAtOnce, offset += int64_t{2} * kRowsAtOnce * p.head_dim) {
                const bool valid = row + i < left;
                uint8_t *to = stage(index) + place(row + i, chunk);
                simt::cp_async16(to, valid ? keys + offset : keys, valid);
                simt::cp_async16(to + Tile::kHalfBytes, valid ? values + offset : values, valid);
            }
        }
        simt::cp_async_commit();
    }

    // scores[t]: of this warp's keys 8t..8t+7 of the stage; past the end kLowest.
    KRASIS_DEVICE void score(int index, float (&scores)[2][4]) const {
        const uint8_t *at = stage(index);
        uint32_t anew = 0;  // known to be so only here: else the query would be read once, into registers
        simt::hold(anew);
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0;
        KRASIS_UNROLL_BY(kHoldsQ ? kSteps : 4)
        for (int step = 0; step < kSteps; ++step) {
            uint32_t b[4];
            simt::ldmatrix_x4(b, at + place(16 * key_warp + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
            uint32_t own[4];
            if constexpr (kHoldsQ) {
                KRASIS_UNROLL
                for (int i = 0; i < 4; ++i) own[i] = q[step][i];
            } else {
                load_q_step(step + static_cast<int>(anew), own);
            }
            simt::mma(Type{}, scores[0], own, {b[0], b[1]});
            simt::mma(Type{}, scores[1], own, {b[2], b[3]});
        }
        const int left = range.end - range.begin - index * Tile::kKeys - 16 * key_warp;
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int key = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            scores[i / 4][i % 4] = key < left ? scores[i / 4][i % 4] * p.scale : kLowest;
        }
    }

    // Scores to exp(score - maximum), the sums so far brought below the new maximum.
    KRASIS_DEVICE void weigh(float (&scores)[2][4]) {
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            float highest = maximum[half];
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float score = scores[i / 2][2 * half + i % 2];
                highest = score > highest ? score : highest;
            }
            KRASIS_UNROLL
            for (int distance = 1; distance < 4; distance *= 2) {
                const float other = simt::shuffle_xor(highest, distance);
                highest = other > highest ? other : highest;
            }
            const float shrink = weight_below(maximum[half], highest);
            maximum[half] = highest;
            sum[half] *= shrink;
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                float &score = scores[i / 2][2 * half + i % 2];
                score = weight_below(score, highest);
                sum[half] += score;
            }
            KRASIS_UNROLL
            for (int t = 0; t < 2 * kPartSteps; ++t) {
                out[t][2 * half] *= shrink;
                out[t][2 * half + 1] *= shrink;
            }
        }
    }

    // Two weights as 16-bit floats, and what that left of them.
    KRASIS_DEVICE static void split(float low, float high, uint32_t &coarse, uint32_t &rest) {
        coarse = pack2<Type>(low, high);
        rest = pack2<Type>(low - Type::to_float(static_cast<uint16_t>(coarse)),
                           high - Type::to_float(static_cast<uint16_t>(coarse >> 16)));
    }

    KRASIS_DEVICE void add_values(int index, const float (&weights)[2][4]) {
        const uint8_t *at = stage(index) + Tile::kHalfBytes;
        uint32_t coarse[4], rest[4];
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float *pair = weights[i / 2] + 2 * (i % 2);
            split(pair[0], pair[1], coarse[i], rest[i]);
        }
        KRASIS_UNROLL
        for (int step = 0; step < kPartSteps; ++step) {
            uint32_t b[4];
            simt::ldmatrix_x4_transposed(
                b, at + place(16 * key_warp + lane % 16, 2 * (part * kPartSteps + step) + lane / 16));
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                simt::mma(Type{}, out[2 * step + half], coarse, {b[2 * half], b[2 * half + 1]});
                simt::mma(Type{}, out[2 * step + half], rest, {b[2 * half], b[2 * half + 1]});
            }
        }
    }

    KRASIS_DEVICE void run() {
        constexpr int kAhead = Tile::kStages - 1;
        KRASIS_UNROLL
        for (int i = 0; i < kAhead; ++i) load(i);
        load_q();
        const int count = (range.end - range.begin + Tile::kKeys - 1) / Tile::kKeys;
        for (int index = 0; index < count; ++index) {
            simt::cp_async_wait<kAhead - 1>();
            simt::sync_threads();  // the stage has arrived, and the one before it has been used
            load(index + kAhead);
            float scores[2][4];
            score(index, scores);
            weigh(scores);
            add_values(index, scores);
        }
        simt::cp_async_wait<0>();
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            KRASIS_UNROLL
            for (int distance = 1; distance < 4; distance *= 2) sum[half] += simt::shuffle_xor(sum[half], distance);
        }
        simt::sync_threads();
    }

    // Among the heads of all rows.
    KRASIS_DEVICE int64_t global_head(int head) const { return batch_row * p.num_heads + first_head + head; }

    KRASIS_DEVICE float *floats() const { return reinterpret_cast<float *>(shared); }

    KRASIS_DEVICE void share() const {
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = key_warp * kHeads + lane / 4 + 8 * half;
            float *to = floats() + row * Tile::kSumFloats + part * Tile::kPartColumns + 2 * (lane % 4);
            KRASIS_UNROLL
            for (int t = 0; t < 2 * kPartSteps; ++t) {
                const simt::Words2 pair{{float_bits(out[t][2 * half]), float_bits(out[t][2 * half + 1])}};
                simt::shared_store(to + 8 * t, pair);
            }
            if (lane % 4 == 0 && part == 0) {
                const simt::Words2 pair{{float_bits(maximum[half]), float_bits(sum[half])}};
                simt::shared_store(floats() + Tile::kStatisticsAt + row * kStatistics, pair);
            }
        }
        simt::sync_threads();
    }

    // How much each warp's sums count, below their common maximum. One thread a head. only: there is one split, so the
    // sink is added here.
    KRASIS_DEVICE void weigh_warps(int split, bool only) const {
        if (thread < kHeads) {
            const float *own = floats() + Tile::kStatisticsAt + thread * kStatistics;
            float maxima[Tile::kKeyWarps], highest = kLowest, total = 0;
            KRASIS_UNROLL
            for (int w = 0; w < Tile::kKeyWarps; ++w) {
                maxima[w] = simt::shared_load<float>(own + w * kHeads * kStatistics);
                highest = maxima[w] > highest ? maxima[w] : highest;
            }
            KRASIS_UNROLL
            for (int w = 0; w < Tile::kKeyWarps; ++w) {
                const float weight = weight_below(maxima[w], highest);
                total = simt::fused_multiply_add(weight, simt::shared_load<float>(own + w * kHeads * kStatistics + 1),
                                                 total);
                simt::shared_store(floats() + Tile::kWeightsAt + thread * Tile::kKeyWarps + w, weight);
            }
            if (only && p.sinks && thread < num_heads) {
                total += simt::exp_float(p.sinks[first_head + thread] - highest);
            }
            simt::shared_store(floats() + Tile::kTotalsAt + thread, total);
            if (thread < num_heads) {
                float *to = p.statistics + (global_head(thread) * p.splits + split) * kStatistics;
                to[0] = highest;
                to[1] = total;
            }
        }
        simt::sync_threads();
    }

    // The warps' parts added up; into out if there is one split only, or into the workspace.
    KRASIS_DEVICE void store(int split, bool only) const {
        const int heads = num_heads < kHeads ? num_heads : kHeads;
        for (int cell = thread; cell < heads * Tile::kDim; cell += Tile::kThreads) {
            const int head = cell / Tile::kDim, column = cell % Tile::kDim;
            if (column >= p.head_dim) continue;
            float value = 0;
            KRASIS_UNROLL
            for (int w = 0; w < Tile::kKeyWarps; ++w) {
                const float weight = simt::shared_load<float>(floats() + Tile::kWeightsAt + head * Tile::kKeyWarps + w);
                const float *row = floats() + (w * kHeads + head) * Tile::kSumFloats;
                value = simt::fused_multiply_add(weight, simt::shared_load<float>(row + column), value);
            }
            if (only) {
                value /= simt::shared_load<float>(floats() + Tile::kTotalsAt + head);
                auto *to = reinterpret_cast<uint16_t *>(p.out + batch_row * p.out_stride);
                to[static_cast<int64_t>(first_head + head) * p.head_dim + column] = Type::from_float(value);
            } else {
                p.sums[(global_head(head) * p.splits + split) * p.head_dim + column] = value;
            }
        }
    }
};

// One block a split of a tile of heads of a row.
template <class Type, int kDim>
KRASIS_KERNEL((AttentionTile<Type, kDim>::kThreads), 2)
attention_split_kernel(const AttentionParams p) {
    const int row = static_cast<int>(simt::block_x()) / p.blocks_per_row;
    const int block = static_cast<int>(simt::block_x()) % p.blocks_per_row, split = block % p.splits;
    const Keys visible = visible_keys(p, row);
    const int count = visible.end - visible.begin;
    const Keys own = keys_of(split, count, p.splits);
    if (own.begin >= own.end) return;
    const bool only = active_splits(count, p.splits) == 1;
    AttentionWorker<AttentionTile<Type, kDim>> worker(p, row, block / p.splits,
                                                      {visible.begin + own.begin, visible.begin + own.end});
    worker.run();
    worker.share();
    worker.weigh_warps(split, only);
    worker.store(split, only);
}

}  // namespace krasis::cuda
