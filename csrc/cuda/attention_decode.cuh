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
// Keys and values of 8 bits are factors as codes, exactly: a key's scale multiplies its scores, a value's its
// probabilities. Channels come in another order then: a lane takes four neighbours of a key, which are one word.
#pragma once

#include "attention_tile.cuh"
#include "int8_dequant.cuh"

namespace krasis::cuda {

// kRing: caches have p.ring places a head, position p lies at p % p.ring.
template <class Tile, bool kRing>
struct AttentionWorker {
    using Type = typename Tile::Type;
    using WeightType = typename Tile::WeightType;
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
    const float *key_scales, *value_scales;
    Keys range;
    int turn_begin;  // the position of the first place, when the range begins
    uint32_t q[kHoldsQ ? kSteps : 1][4];
    float out[2 * kPartSteps][4];  // [8 columns][fragment], unscaled
    float maximum[2], sum[2];      // of rows lane / 4 and lane / 4 + 8; sum: of this lane's keys

    KRASIS_DEVICE AttentionWorker(const AttentionParams &params, int64_t own_row, int head_block, const Keys &own)
        : p(params), shared(simt::shared_memory()), batch_row(own_row), range(own) {
        if constexpr (kRing) turn_begin = range.begin - range.begin % p.ring;
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        key_warp = thread / 32 / Tile::kParts;
        part = thread / 32 % Tile::kParts;
        const int kv_head = head_block / p.head_tiles, tile = head_block % p.head_tiles;
        first_head = kv_head * p.heads_per_kv + tile * kHeads;
        num_heads = p.heads_per_kv - tile * kHeads;
        const int64_t first_row = static_cast<int64_t>(kv_head) * (kRing ? p.ring : p.capacity);
        query = p.q + batch_row * p.q_stride;
        keys = p.rows ? static_cast<const uint8_t *>(p.rows[batch_row].keys) + p.keys_offset : p.keys;
        values = p.rows ? static_cast<const uint8_t *>(p.rows[batch_row].values) + p.values_offset : p.values;
        key_scales = reinterpret_cast<const float *>(keys + p.scales_offset) + first_row;
        value_scales = reinterpret_cast<const float *>(values + p.scales_offset) + first_row;
        keys += first_row * p.head_dim * Tile::kItemBytes;
        values += first_row * p.head_dim * Tile::kItemBytes;
        KRASIS_UNROLL
        for (int i = 0; i < 8 * kPartSteps; ++i) out[i / 4][i % 4] = 0;
        maximum[0] = maximum[1] = kLowest;
        sum[0] = sum[1] = 0;
    }

    // Where a key of the range lies: it has no more of them than the ring has places.
    KRASIS_DEVICE int place_of(int key) const {
        if constexpr (!kRing) return key;
        const int from_first = key - turn_begin;
        return from_first < p.ring ? from_first : from_first - p.ring;
    }

    // The query as fragments; heads and columns past the last are zeros.
    KRASIS_DEVICE void load_q_step(int step, uint32_t (&to)[4]) const {
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int own = Tile::kCodes ? 4 * (lane % 4) + 2 * (i / 2) : 8 * (i / 2) + 2 * (lane % 4);
            const int head = lane / 4 + 8 * (i % 2), column = 16 * step + own;
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

    // Starts the copies of a stage, or of nothing past the last; one group either way. Keys past the end are zeros.
    KRASIS_DEVICE void load(int index) {
        const int first = range.begin + index * Tile::kKeys;
        if (first < range.end) {
            constexpr int kRowsAtOnce = Tile::kThreads / Tile::kRowChunks;
            const int row = thread / Tile::kRowChunks, chunk = thread % Tile::kRowChunks;
            const int left = chunk * Tile::kChunkItems < p.head_dim ? range.end - first : 0;
            const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * Tile::kItemBytes;
            int64_t offset = (first + row) * row_bytes + chunk * 16;
            KRASIS_UNROLL_BY(4)
            for (int i = 0; i < Tile::kKeys; i += kRowsAtOnce, offset += kRowsAtOnce * row_bytes) {
                const bool valid = row + i < left;
                if constexpr (kRing) offset = place_of(first + row + i) * row_bytes + chunk * 16;
                uint8_t *to = stage(index) + Tile::place(row + i, chunk);
                simt::cp_async16(to, valid ? keys + offset : keys, valid);
                simt::cp_async16(to + Tile::kHalfBytes, valid ? values + offset : values, valid);
            }
        }
        simt::cp_async_commit();
    }

    // The scales of a stage; where there are none, nothing is read.
    KRASIS_DEVICE void load_scales(int index, StageScales &to) const {
        if constexpr (Tile::kCodes) {
            const int first = range.begin + index * Tile::kKeys + 16 * key_warp + 2 * (lane % 4);
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int key = first + 8 * (i / 2) + i % 2;
                const bool exists = key < range.end;
                to.keys[i / 2][i % 2] = exists ? key_scales[place_of(key)] : 0.0f;
                to.values[i / 2][i % 2] = exists ? value_scales[place_of(key)] : 0.0f;
            }
        }
    }

    KRASIS_DEVICE void q_step(int step, uint32_t anew, uint32_t (&to)[4]) const {
        if constexpr (kHoldsQ) {
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) to[i] = q[step][i];
        } else {
            load_q_step(step + static_cast<int>(anew), to);
        }
    }

    KRASIS_DEVICE void multiply_floats(const uint8_t *at, int step, uint32_t anew, float (&scores)[2][4]) const {
        uint32_t b[4], own[4];
        simt::ldmatrix_x4(b, at + Tile::place(16 * key_warp + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        q_step(step, anew, own);
        simt::mma(Type{}, scores[0], own, {b[0], b[1]});
        simt::mma(Type{}, scores[1], own, {b[2], b[3]});
    }

    // Steps step and step + 1: a chunk of a row has the codes of one.
    KRASIS_DEVICE void multiply_codes(const uint8_t *at, int step, uint32_t anew, float (&scores)[2][4]) const {
        uint32_t words[4];
        simt::ldmatrix_x4(words, at + Tile::place(16 * key_warp + lane % 16, step + lane / 16));
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            uint32_t own[4];
            q_step(step + half, anew, own);
            KRASIS_UNROLL
            for (int t = 0; t < 2; ++t) {
                uint32_t b[2];
                int8_to_floats(Type{}, words[2 * half + t], b);
                simt::mma(Type{}, scores[t], own, b);
            }
        }
    }

    // scores[t]: of this warp's keys 8t..8t+7 of the stage; past the end kLowest.
    KRASIS_DEVICE void score(int index, const StageScales &scales, float (&scores)[2][4]) const {
        const uint8_t *at = stage(index);
        uint32_t anew = 0;  // known to be so only here: else the query would be read once, into registers
        simt::hold(anew);
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = 0;
        if constexpr (Tile::kCodes) {
            KRASIS_UNROLL_BY(kHoldsQ ? kSteps : 4)
            for (int step = 0; step < kSteps; step += 2) multiply_codes(at, step, anew, scores);
            KRASIS_UNROLL
            for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= scales.keys[i / 4][i % 2];
        } else {
            KRASIS_UNROLL_BY(kHoldsQ ? kSteps : 4)
            for (int step = 0; step < kSteps; ++step) multiply_floats(at, step, anew, scores);
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

    KRASIS_DEVICE void add_floats(const uint8_t *at, int step, const uint32_t (&coarse)[4], const uint32_t (&rest)[4]) {
        uint32_t b[4];
        simt::ldmatrix_x4_transposed(
            b, at + Tile::place(16 * key_warp + lane % 16, 2 * (part * kPartSteps + step) + lane / 16));
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            simt::mma(Type{}, out[2 * step + half], coarse, {b[2 * half], b[2 * half + 1]});
            simt::mma(Type{}, out[2 * step + half], rest, {b[2 * half], b[2 * half + 1]});
        }
    }

    // Steps step and step + 1 of this part; an out tile has every second of 16 channels, beginning with the first or
    // the second.
    KRASIS_DEVICE void add_codes(const uint8_t *at, int step, const uint32_t (&coarse)[4], const uint32_t (&rest)[4]) {
        uint32_t words[4];
        simt::ldmatrix_x4_transposed(words,
                                     at + Tile::place(16 * key_warp + lane % 16, part * kPartSteps + step + lane / 16));
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            uint32_t low[2], high[2];
            int8_to_floats<true>(WeightType{}, words[2 * half], low);
            int8_to_floats<true>(WeightType{}, words[2 * half + 1], high);
            KRASIS_UNROLL
            for (int odd = 0; odd < 2; ++odd) {
                simt::mma(WeightType{}, out[2 * (step + half) + odd], coarse, {low[odd], high[odd]});
                simt::mma(WeightType{}, out[2 * (step + half) + odd], rest, {low[odd], high[odd]});
            }
        }
    }

    KRASIS_DEVICE void add_values(int index, const StageScales &scales, const float (&weights)[2][4]) {
        const uint8_t *at = stage(index) + Tile::kHalfBytes;
        uint32_t coarse[4], rest[4];
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            float low = weights[i / 2][2 * (i % 2)], high = weights[i / 2][2 * (i % 2) + 1];
            if constexpr (Tile::kCodes) {
                low *= scales.values[i / 2][0];
                high *= scales.values[i / 2][1];
            }
            split_weights<WeightType>(low, high, coarse[i], rest[i]);
        }
        KRASIS_UNROLL
        for (int step = 0; step < kPartSteps; step += Tile::kCodes ? 2 : 1) {
            if constexpr (Tile::kCodes) {
                add_codes(at, step, coarse, rest);
            } else {
                add_floats(at, step, coarse, rest);
            }
        }
    }

    KRASIS_DEVICE void run() {
        constexpr int kAhead = Tile::kStages - 1;
        KRASIS_UNROLL
        for (int i = 0; i < kAhead; ++i) load(i);
        load_q();
        StageScales next;
        load_scales(0, next);
        const int count = (range.end - range.begin + Tile::kKeys - 1) / Tile::kKeys;
        for (int index = 0; index < count; ++index) {
            simt::cp_async_wait<kAhead - 1>();
            simt::sync_threads();  // the stage has arrived, and the one before it has been used
            load(index + kAhead);
            const StageScales scales = next;
            load_scales(index + 1, next);
            float scores[2][4];
            score(index, scales, scores);
            weigh(scores);
            add_values(index, scales, scores);
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

    // This lane's sums of a row, to where its columns of the part begin.
    KRASIS_DEVICE void share_sums(float *to, int half) const {
        if constexpr (Tile::kCodes) {
            KRASIS_UNROLL
            for (int t = 0; t < 2 * kPartSteps; t += 2) {
                const simt::Words4 four{{float_bits(out[t][2 * half]), float_bits(out[t + 1][2 * half]),
                                         float_bits(out[t][2 * half + 1]), float_bits(out[t + 1][2 * half + 1])}};
                simt::shared_store(to + 8 * t + 4 * (lane % 4), four);
            }
        } else {
            KRASIS_UNROLL
            for (int t = 0; t < 2 * kPartSteps; ++t) {
                const simt::Words2 pair{{float_bits(out[t][2 * half]), float_bits(out[t][2 * half + 1])}};
                simt::shared_store(to + 8 * t + 2 * (lane % 4), pair);
            }
        }
    }

    KRASIS_DEVICE void share() const {
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = key_warp * kHeads + lane / 4 + 8 * half;
            share_sums(floats() + row * Tile::kSumFloats + part * Tile::kPartColumns, half);
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

}  // namespace krasis::cuda
