// latent_attention.cuh: attention over latents: a tile of up to 32 queries (a head of a row each) in a block, which
// reads a split of the keys once, in stages of 32 through a ring of cp.async. Rows of one sequence share tiles; rows
// with caches of their own do not.
//
// A key of 576 channels is too long for one warp's registers. Scores: each warp multiplies a quarter of the channels of
// half of the keys, whose fragments of the queries it keeps, and leaves its part in shared memory; eight threads a head
// add the four parts up, keep the running maximum, and leave the weights there, as the sum of two 16-bit floats (see
// attention_decode.cuh). Values: each warp has an eighth of the columns of all heads. The values are the first kv_rank
// channels of the keys: they are in shared memory already.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kLatentMaxSplits = 128;
inline constexpr int kLatentKeys = 32;       // of a stage; a split has a multiple of so many
inline constexpr int kLatentStatistics = 2;  // of a split of a head: the maximum, and the sum of exponentials below it
inline constexpr int kLatentRope = 64;       // at most, of a key's channels behind the latent
inline constexpr float kNothing = -__builtin_inff();  // the maximum of no scores

struct LatentParams {
    const uint8_t *q_latent, *q_rope;  // 16-bit
    uint8_t *out;
    const uint8_t *cache;                                // of all rows, if rows is null
    const krasis_cuda_row *rows;                         // [num_rows]
    float *statistics;                                   // [num_rows, num_heads, splits, 2]
    float *sums;                                         // [num_rows, num_heads, splits, kv_rank]
    int64_t start, keys_offset, rope_stride, rope_head;  // in bytes but for start
    int64_t num_queries;                                 // of all rows
    int32_t capacity, num_heads, tiles_per_row, tile_queries, kv_rank, rope_dim, splits;
    float scale;
};

// Queries [begin, end), counted as row * num_heads + head.
struct LatentQueries {
    int64_t begin, end;
};

// Those of a tile.
KRASIS_DEVICE LatentQueries latent_queries(const LatentParams &p, int64_t tile) {
    const int64_t row = p.rows ? tile / p.tiles_per_row : 0, last = p.rows ? (row + 1) * p.num_heads : p.num_queries;
    const int64_t begin = row * p.num_heads + (p.rows ? tile % p.tiles_per_row : tile) * p.tile_queries;
    return {begin, begin + p.tile_queries < last ? begin + p.tile_queries : last};
}

KRASIS_DEVICE int64_t latent_tile(const LatentParams &p, int64_t query) {
    if (!p.rows) return query / p.tile_queries;
    return query / p.num_heads * p.tiles_per_row + query % p.num_heads / p.tile_queries;
}

// How many keys a row's query sees; a position outside of the cache counts as its nearest end.
KRASIS_DEVICE int latent_keys(const LatentParams &p, int64_t row) {
    const int64_t position = p.rows ? p.rows[row].position : p.start + row;
    return position < 0 ? 0 : position < p.capacity ? static_cast<int>(position) + 1 : p.capacity;
}

// How many a tile's last row sees: no other sees more.
KRASIS_DEVICE int latent_tile_keys(const LatentParams &p, const LatentQueries &queries) {
    return latent_keys(p, (queries.end - 1) / p.num_heads);
}

KRASIS_DEVICE int latent_keys_per_split(int count, int splits) {
    return ((count - 1) / splits / kLatentKeys + 1) * kLatentKeys;
}

KRASIS_DEVICE int latent_active_splits(int count, int splits) {
    return count == 0 ? 0 : (count - 1) / latent_keys_per_split(count, splits) + 1;
}

// exp(x - maximum), where the maximum of nothing is kNothing.
KRASIS_DEVICE float below(float x, float maximum) { return x == kNothing ? 0.0f : simt::exp_float(x - maximum); }

template <class Type_, int kRank_, int kRowTiles_>
struct LatentTile {
    using Type = Type_;
    static constexpr int kRank = kRank_, kRowTiles = kRowTiles_;  // the latent's channels, rounded up; 16 queries each
    static constexpr int kWidth = kRank + kLatentRope, kSteps = kWidth / 16;
    static constexpr int kQuarterSteps = kSteps / 4;
    static constexpr int kWarps = 8, kThreads = 32 * kWarps;
    static constexpr int kHeads = 16 * kRowTiles;
    static constexpr int kStages = 2;
    static constexpr int kRowBytes = 2 * kWidth, kRowChunks = kRowBytes / 16;
    static constexpr int kStageBytes = kLatentKeys * kRowBytes;
    static constexpr int kCopies = kLatentKeys * kRowChunks / kThreads;
    static constexpr int kColumns = kRank / kWarps, kColumnSteps = kColumns / 16;  // of a warp
    static constexpr int kPartsAt = kStages * kStageBytes;                         // float [quarter][head][key]
    static constexpr int kWeightsAt = kPartsAt + 4 * kHeads * kLatentKeys * 4;     // 16-bit [value, rest][head][key]
    static constexpr int kWeightBytes = kHeads * kLatentKeys * 2;
    static constexpr int kFactorsAt = kWeightsAt + 2 * kWeightBytes;  // float [head]
    static constexpr int kSharedBytes = kFactorsAt + kHeads * 4;
    static_assert(kSteps % 4 == 0 && kRowChunks % 8 == 0 && kLatentKeys * kRowChunks % kThreads == 0);
    static_assert(kColumns % 16 == 0 && kSharedBytes <= 96 * 1024);  // what every target has
};

template <class Tile>
struct LatentWorker {
    using Type = typename Tile::Type;
    static constexpr int kRowTiles = Tile::kRowTiles, kQuarterSteps = Tile::kQuarterSteps;
    static constexpr int kColumnSteps = Tile::kColumnSteps;

    const LatentParams &p;
    uint8_t *shared;
    int thread, lane, warp, quarter, half;  // half: of the keys of a stage
    LatentQueries queries;
    const uint8_t *keys;  // of this split
    int begin, count;
    uint32_t q[kRowTiles][kQuarterSteps][4];
    float out[kRowTiles][2 * kColumnSteps][4];  // [8 columns][fragment], unscaled
    int seen;                                   // keys of this split that query thread / 8 sees
    float maximum, sum;                         // of query thread / 8; sum: of this thread's keys

    KRASIS_DEVICE LatentWorker(const LatentParams &params, const LatentQueries &own, int first, int end)
        : p(params),
          shared(simt::shared_memory()),
          queries(own),
          begin(first),
          count(end - first),
          maximum(kNothing),
          sum(0) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        warp = thread / 32;
        quarter = warp / 2;
        half = warp % 2;
        const int64_t query = queries.begin + thread / 8;
        seen = query < queries.end ? latent_keys(p, query / p.num_heads) - begin : 0;
        seen = seen < count ? seen : count;
        const uint8_t *cache = p.cache;
        if (p.rows) cache = static_cast<const uint8_t *>(p.rows[queries.begin / p.num_heads].keys) + p.keys_offset;
        keys = cache + static_cast<int64_t>(begin) * (p.kv_rank + p.rope_dim) * 2;
        KRASIS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            KRASIS_UNROLL
            for (int i = 0; i < 8 * kColumnSteps; ++i) out[m][i / 4][i % 4] = 0;
        }
    }

    // Channels [column, column + 2) of a query; past the last zeros.
    KRASIS_DEVICE uint32_t query_pair(int64_t query, int column) const {
        if (query >= queries.end || column >= p.kv_rank + p.rope_dim) return 0;
        const int64_t row = query / p.num_heads, head = query % p.num_heads;
        const uint8_t *at = column < p.kv_rank
                                ? p.q_latent + (query * p.kv_rank + column) * 2
                                : p.q_rope + row * p.rope_stride + head * p.rope_head + (column - p.kv_rank) * 2;
        return *reinterpret_cast<const uint32_t *>(at);
    }

    KRASIS_DEVICE void load_q() {
        KRASIS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            KRASIS_UNROLL
            for (int step = 0; step < kQuarterSteps; ++step) {
                KRASIS_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int column = 16 * (quarter * kQuarterSteps + step) + 8 * (i / 2) + 2 * (lane % 4);
                    q[m][step][i] = query_pair(queries.begin + 16 * m + lane / 4 + 8 * (i % 2), column);
                }
            }
        }
    }

    KRASIS_DEVICE uint8_t *stage(int index) const { return shared + index % Tile::kStages * Tile::kStageBytes; }

    // Eight rows in a row of chunks must fall into different banks.
    KRASIS_DEVICE static int place(int key, int chunk) { return key * Tile::kRowBytes + (chunk ^ key % 8) * 16; }

    // Starts the copies of a stage, or of nothing past the last; one group either way. Keys past the end are zeros, and
    // so are channels past a key's last.
    KRASIS_DEVICE void load(int index) {
        const int first = index * kLatentKeys;
        if (first < count) {
            const int row_bytes = (p.kv_rank + p.rope_dim) * 2;
            KRASIS_UNROLL_BY(5)
            for (int i = 0; i < Tile::kCopies; ++i) {
                const int cell = i * Tile::kThreads + thread, key = cell / Tile::kRowChunks;
                const int chunk = cell % Tile::kRowChunks;
                const bool valid = first + key < count && chunk * 16 < row_bytes;
                const uint8_t *from = keys + static_cast<int64_t>(first + key) * row_bytes + chunk * 16;
                simt::cp_async16(stage(index) + place(key, chunk), valid ? from : keys, valid);
            }
        }
        simt::cp_async_commit();
    }

    KRASIS_DEVICE float *parts() const { return reinterpret_cast<float *>(shared + Tile::kPartsAt); }
    KRASIS_DEVICE float *factors() const { return reinterpret_cast<float *>(shared + Tile::kFactorsAt); }

    // Rows of parts begin in one bank: four of them are shifted against each other.
    KRASIS_DEVICE static int part_cell(int head, int key) { return head * kLatentKeys + (key ^ head % 4 * 8); }

    // Two rows of weights fill the banks once: eight must not meet.
    KRASIS_DEVICE static int weight_place(int head, int chunk) {
        return head * kLatentKeys * 2 + (chunk ^ head / 2 % 4) * 16;
    }

    // This warp's part of the scores: a quarter of the channels, half of the keys.
    KRASIS_DEVICE void score(int index) const {
        const uint8_t *at = stage(index);
        float scores[kRowTiles][2][4];
        KRASIS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            KRASIS_UNROLL
            for (int i = 0; i < 8; ++i) scores[m][i / 4][i % 4] = 0;
        }
        KRASIS_UNROLL
        for (int step = 0; step < kQuarterSteps; ++step) {
            uint32_t b[4];
            const int chunk = 2 * (quarter * kQuarterSteps + step) + lane / 8 % 2;
            simt::ldmatrix_x4(b, at + place(16 * half + lane % 8 + lane / 16 * 8, chunk));
            KRASIS_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                simt::mma(Type{}, scores[m][0], q[m][step], {b[0], b[1]});
                simt::mma(Type{}, scores[m][1], q[m][step], {b[2], b[3]});
            }
        }
        float *to = parts() + quarter * Tile::kHeads * kLatentKeys;
        KRASIS_UNROLL
        for (int i = 0; i < 4 * kRowTiles; ++i) {
            const int m = i / 4, tile = i / 2 % 2, low = i % 2;
            const int head = 16 * m + lane / 4 + 8 * low, key = 16 * half + 8 * tile + 2 * (lane % 4);
            const simt::Words2 pair{{float_bits(scores[m][tile][2 * low]), float_bits(scores[m][tile][2 * low + 1])}};
            simt::shared_store(to + part_cell(head, key), pair);
        }
    }

    // Scores to exp(score - maximum), by eight threads a head, four keys each; factors: what the sums so far are
    // multiplied by to be below the new maximum.
    KRASIS_DEVICE void weigh(int index) {
        const int head = thread / 8, first = thread % 8 * 4;
        float scores[4] = {};
        KRASIS_UNROLL
        for (int part = 0; part < 4; ++part) {
            const float *from = parts() + part * Tile::kHeads * kLatentKeys + part_cell(head, first);
            const auto words = simt::shared_load<simt::Words4>(from);
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) scores[i] += bits_float(words.w[i]);
        }
        const int left = seen - index * kLatentKeys - first;
        float highest = maximum;
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            scores[i] = i < left ? scores[i] * p.scale : kNothing;
            highest = scores[i] > highest ? scores[i] : highest;
        }
        KRASIS_UNROLL
        for (int distance = 1; distance < 8; distance *= 2) {
            const float other = simt::shuffle_xor(highest, distance);
            highest = other > highest ? other : highest;
        }
        const float shrink = below(maximum, highest);
        maximum = highest;
        sum *= shrink;
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            scores[i] = below(scores[i], highest);
            sum += scores[i];
        }
        simt::Words2 values, rest;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) split(scores[2 * i], scores[2 * i + 1], values.w[i], rest.w[i]);
        uint8_t *to = shared + Tile::kWeightsAt + weight_place(head, first / 8) + first % 8 * 2;
        simt::shared_store(to, values);
        simt::shared_store(to + Tile::kWeightBytes, rest);
        if (thread % 8 == 0) simt::shared_store(factors() + head, shrink);
    }

    // Two weights as 16-bit floats, and what that left of them.
    KRASIS_DEVICE static void split(float low, float high, uint32_t &value, uint32_t &rest) {
        value = pack2<Type>(low, high);
        rest = pack2<Type>(low - Type::to_float(static_cast<uint16_t>(value)),
                           high - Type::to_float(static_cast<uint16_t>(value >> 16)));
    }

    KRASIS_DEVICE void shrink_sums() {
        KRASIS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            KRASIS_UNROLL
            for (int low = 0; low < 2; ++low) {
                const float factor = simt::shared_load<float>(factors() + 16 * m + 8 * low + lane / 4);
                KRASIS_UNROLL
                for (int t = 0; t < 2 * kColumnSteps; ++t) {
                    out[m][t][2 * low] *= factor;
                    out[m][t][2 * low + 1] *= factor;
                }
            }
        }
    }

    KRASIS_DEVICE void add_values(int index) {
        const uint8_t *at = stage(index), *weights = shared + Tile::kWeightsAt;
        shrink_sums();
        KRASIS_UNROLL
        for (int k16 = 0; k16 < kLatentKeys / 16; ++k16) {
            uint32_t values[kRowTiles][4], rest[kRowTiles][4];
            KRASIS_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                const uint8_t *from = weights + weight_place(16 * m + lane % 16, 2 * k16 + lane / 16);
                simt::ldmatrix_x4(values[m], from);
                simt::ldmatrix_x4(rest[m], from + Tile::kWeightBytes);
            }
            KRASIS_UNROLL
            for (int step = 0; step < kColumnSteps; ++step) {
                uint32_t b[4];
                const int chunk = 2 * (warp * kColumnSteps + step) + lane / 16;
                simt::ldmatrix_x4_transposed(b, at + place(16 * k16 + lane % 16, chunk));
                KRASIS_UNROLL
                for (int m = 0; m < kRowTiles; ++m) {
                    KRASIS_UNROLL
                    for (int part = 0; part < 2; ++part) {
                        simt::mma(Type{}, out[m][2 * step + part], values[m], {b[2 * part], b[2 * part + 1]});
                        simt::mma(Type{}, out[m][2 * step + part], rest[m], {b[2 * part], b[2 * part + 1]});
                    }
                }
            }
        }
    }

    KRASIS_DEVICE bool weighs() const { return thread < 8 * Tile::kHeads; }  // whole warps

    KRASIS_DEVICE void run() {
        load(0);
        load_q();
        const int stages = (count + kLatentKeys - 1) / kLatentKeys;
        for (int index = 0; index < stages; ++index) {
            simt::cp_async_wait<0>();
            simt::sync_threads();  // the stage has arrived, and the one before it has been used
            load(index + 1);
            score(index);
            simt::sync_threads();
            if (weighs()) weigh(index);
            simt::sync_threads();
            add_values(index);
        }
        simt::cp_async_wait<0>();
        simt::sync_threads();
    }

    // The sums of exponentials; of each head where the factors were, so that all can divide by it.
    KRASIS_DEVICE void share_sums(int split_number) {
        if (weighs()) {
            const int head = thread / 8;
            KRASIS_UNROLL
            for (int distance = 1; distance < 8; distance *= 2) sum += simt::shuffle_xor(sum, distance);
            if (thread % 8 == 0) {
                simt::shared_store(factors() + head, sum);
                const int64_t query = queries.begin + head;
                if (query < queries.end && p.statistics) {
                    float *to = p.statistics + (query * p.splits + split_number) * kLatentStatistics;
                    to[0] = maximum;
                    to[1] = sum;
                }
            }
        }
        simt::sync_threads();
    }

    // Into out if there is one split only, or into the workspace.
    KRASIS_DEVICE void store(int split_number, bool only) const {
        KRASIS_UNROLL
        for (int i = 0; i < 4 * kColumnSteps * kRowTiles; ++i) {
            const int m = i / (4 * kColumnSteps), tile = i / 2 % (2 * kColumnSteps), low = i % 2;
            const int head = 16 * m + lane / 4 + 8 * low, column = warp * Tile::kColumns + 8 * tile + 2 * (lane % 4);
            const float first = out[m][tile][2 * low], second = out[m][tile][2 * low + 1];
            const int64_t query = queries.begin + head;
            if (query >= queries.end || column >= p.kv_rank) continue;
            if (only) {
                const float total = simt::shared_load<float>(factors() + head);
                *reinterpret_cast<uint32_t *>(p.out + (query * p.kv_rank + column) * 2) =
                    pack2<Type>(first / total, second / total);
            } else {
                *reinterpret_cast<simt::Words2 *>(p.sums + (query * p.splits + split_number) * p.kv_rank +
                                                  column) = {{float_bits(first), float_bits(second)}};
            }
        }
    }
};

// Blocks: [tile][split].
template <class Type, int kRank, int kRowTiles>
KRASIS_KERNEL((LatentTile<Type, kRank, kRowTiles>::kThreads), 1)
latent_attention_kernel(const LatentParams p) {
    const int split = static_cast<int>(simt::block_x()) % p.splits;
    const LatentQueries queries = latent_queries(p, static_cast<int>(simt::block_x()) / p.splits);
    const int count = latent_tile_keys(p, queries);
    if (count == 0) return;
    const int each = latent_keys_per_split(count, p.splits), begin = split * each;
    if (begin >= count) return;
    const bool only = latent_active_splits(count, p.splits) == 1;
    LatentWorker<LatentTile<Type, kRank, kRowTiles>> worker(p, queries, begin,
                                                            begin + each < count ? begin + each : count);
    worker.run();
    worker.share_sums(split);
    worker.store(split, only);
}

}  // namespace krasis::cuda
