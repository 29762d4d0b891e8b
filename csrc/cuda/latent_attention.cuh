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

#include "latent_tile.cuh"

namespace krasis::cuda {

template <class Tile>
struct LatentWorker {
    using Type = typename Tile::Type;
    static constexpr int kRowTiles = Tile::kRowTiles, kQuarterSteps = Tile::kQuarterSteps;
    static constexpr int kColumnSteps = Tile::kColumnSteps;

    const LatentParams &p;
    uint8_t *shared;
    int thread, lane, warp, quarter, half;  // half: of the keys of a stage
    LatentQueries queries;
    const uint8_t *keys;    // of this split; of the whole cache where some are chosen
    const int32_t *chosen;  // of this split
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
        keys = Tile::kChosen ? cache : cache + static_cast<int64_t>(begin) * (p.kv_rank + p.rope_dim) * 2;
        chosen = Tile::kChosen ? p.chosen + queries.begin / p.num_heads * p.budget + begin : nullptr;
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
                bool valid = first + key < count && chunk * 16 < row_bytes;
                int64_t at = first + key;
                if constexpr (Tile::kChosen) {
                    at = valid ? chosen[at] : 0;
                    valid = valid && at >= 0 && at < p.capacity;  // what a kernel wrote could not be checked before
                }
                const uint8_t *from = keys + at * row_bytes + chunk * 16;
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
template <class Type, int kRank, int kRowTiles, bool kChosen>
KRASIS_KERNEL((LatentTile<Type, kRank, kRowTiles>::kThreads), 1)
latent_attention_kernel(const LatentParams p) {
    const int split = static_cast<int>(simt::block_x()) % p.splits;
    const LatentQueries queries = latent_queries(p, static_cast<int>(simt::block_x()) / p.splits);
    const int count = latent_tile_keys(p, queries);
    if (count == 0) return;
    const int each = latent_keys_per_split(count, p.splits), begin = split * each;
    if (begin >= count) return;
    const bool only = latent_active_splits(count, p.splits) == 1;
    LatentWorker<LatentTile<Type, kRank, kRowTiles, kChosen>> worker(p, queries, begin,
                                                                     begin + each < count ? begin + each : count);
    worker.run();
    worker.share_sums(split);
    worker.store(split, only);
}

}  // namespace krasis::cuda
