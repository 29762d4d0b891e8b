// index_kernel.h: keys and scores of an index over tokens, compiled once per instruction set.
#pragma once

#include "activation_math.h"
#include "attention_tiles.h"
#include "cache_bytes.h"
#include "index.h"
#include "spans.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

// y = (x - mean) / sqrt(variance + eps) * norm + bias, of dim channels, dim % 16 == 0.
void layer_norm(const krasis_index_args &args, const float *x, float *y) {
    V16 sum = V16::zero(), squares = V16::zero();
    for (int64_t i = 0; i < args.dim; i += 16) sum = add(sum, V16::load(x + i));
    const V16 mean = V16::set1(hsum(sum) / static_cast<float>(args.dim));
    for (int64_t i = 0; i < args.dim; i += 16) {
        const V16 away = sub(V16::load(x + i), mean);
        squares = fma(away, away, squares);
    }
    const float variance = hsum(squares) / static_cast<float>(args.dim);
    const V16 inverse = V16::set1(1.0f / __builtin_sqrtf(variance + args.eps));
    for (int64_t i = 0; i < args.dim; i += 16) {
        const V16 normed = mul(sub(V16::load(x + i), mean), inverse);
        fma(normed, V16::load(args.norm + i), V16::load(args.bias + i)).store(y + i);
    }
}

// Turns the first channels of a head or key where they lie.
void turn_in_place(const krasis_index_args &args, int64_t position, float *x) {
    const int64_t pairs = args.rotary_dims / 2;
    const float *cos = args.cos + position * pairs, *sin = args.sin + position * pairs;
    const bool halves = args.rope_style == KRASIS_ROPE_HALF;
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t first = halves ? i : 2 * i, second = halves ? pairs + i : 2 * i + 1;
        const float x1 = x[first], x2 = x[second];
        x[first] = __builtin_fmaf(-x2, sin[i], x1 * cos[i]);
        x[second] = __builtin_fmaf(x1, sin[i], x2 * cos[i]);
    }
}

// Part 0 of a token's row is its key, part 1 its gates.
void store_part(const krasis_index_args &args, const float *y, int64_t part, uint8_t *row) {
    const int64_t first = part * args.dim;
    if (args.kv_dtype == KRASIS_I8) {
        int8_t *codes = reinterpret_cast<int8_t *>(row), *scales = codes + (args.block > 1 ? 2 : 1) * args.dim;
        return store_bytes(y, args.dim, codes + first, scales + part * kScaleBytes);
    }
    for (int64_t i = 0; i < args.dim; i += 8) {
        if (args.kv_dtype == KRASIS_F16) {
            V8::load(y + i).store_f16(reinterpret_cast<uint16_t *>(row) + first + i);
        } else {
            V8::load(y + i).store(reinterpret_cast<float *>(row) + first + i);
        }
    }
}

// 16 channels of a part of a pool's token.
KRASIS_INLINE V16 load_part(const krasis_index_args &args, const uint8_t *row, int64_t part, int64_t channel) {
    const int64_t at = part * args.dim + channel;
    if (args.kv_dtype == KRASIS_F16) return V16::load_f16(reinterpret_cast<const uint16_t *>(row) + at);
    if (args.kv_dtype == KRASIS_F32) return V16::load(reinterpret_cast<const float *>(row) + at);
    float scale;
    std::memcpy(&scale, row + 2 * args.dim + part * kScaleBytes, sizeof(scale));
    return mul(V16::load_i8(reinterpret_cast<const int8_t *>(row) + at), V16::set1(scale));
}

// y [dim] of the tokens of a pool, whose rows begin at first: token after token, so that all calls give the same bits.
void pool_key(const krasis_index_args &args, const uint8_t *first, float *y) {
    const int64_t bytes = row_bytes(args);
    V16 gates[kMostPoolTokens];
    for (int64_t i = 0; i < args.dim; i += 16) {
        V16 most = V16::set1(-3.0e38f), sum = V16::zero(), keys = V16::zero();
        for (int64_t token = 0; token < args.block; ++token) {
            const V16 position = V16::load(args.positions + token * args.dim + i);
            gates[token] = add(load_part(args, first + token * bytes, 1, i), position);
            most = max(most, gates[token]);
        }
        for (int64_t token = 0; token < args.block; ++token) {
            const V16 weight = exp(sub(gates[token], most));
            sum = add(sum, weight);
            keys = fma(weight, load_part(args, first + token * bytes, 0, i), keys);
        }
        div(keys, sum).store(y + i);
    }
}

// Everything that scoring needs besides its inputs: 200 KiB of the thread's stack at most.
struct ScoreScratch {
    static constexpr int kStride = kMostIndexDim + 16;  // floats between keys: see attention_kernel.h
    alignas(64) float queries[kMostIndexSize];          // panels of [dim][heads of the panel]
    alignas(64) float keys[kScoreBlock * kStride];
    alignas(64) float scores[kPanelRows * kScoreBlock];  // of a panel's heads
};

void pack_heads(const krasis_choose_args &args, const float *q, float *packed) {
    for (int64_t first = 0; first < args.heads;) {
        const int64_t width = panel_width(args.heads - first);
        float *panel = packed + first * args.dim;
        for (int64_t i = 0; i < width; ++i) {
            const float *head = first + i < args.heads ? q + (first + i) * args.dim : nullptr;
            for (int64_t d = 0; d < args.dim; ++d) panel[d * width + i] = head ? head[d] : 0.0f;
        }
        first += width;
    }
}

// keys: the first one's row; a pool's key is in the row of its last token.
void load_keys(const krasis_choose_args &args, const uint8_t *keys, int64_t num_keys, float *to) {
    const int64_t step = row_bytes(args) * args.block, parts = args.block > 1 ? 2 : 1;
    for (int64_t key = 0; key < num_keys; ++key, keys += step, to += ScoreScratch::kStride) {
        if (args.kv_dtype == KRASIS_I8) {
            const int8_t *codes = reinterpret_cast<const int8_t *>(keys);
            load_bytes(codes, codes + parts * args.dim, args.dim, to);
            continue;
        }
        for (int64_t d = 0; d < args.dim; d += 8) {
            (args.kv_dtype == KRASIS_F16 ? load8(reinterpret_cast<const uint16_t *>(keys) + d)
                                         : load8(reinterpret_cast<const float *>(keys) + d))
                .store(to + d);
        }
    }
}

// scores [kScoreBlock] of one block of keys: heads are added in their order.
void score_block(const krasis_choose_args &args, const float *weights, int64_t num_keys, ScoreScratch &scratch,
                 float *scores) {
    const Ahead nothing;
    V16 total[4] = {V16::zero(), V16::zero(), V16::zero(), V16::zero()};
    for (int64_t first = 0; first < args.heads;) {
        const int64_t left = args.heads - first, width = panel_width(left);
        const float *queries = scratch.queries + first * args.dim;
        constexpr int kStride = ScoreScratch::kStride;
        if (width == kPanelRows) {
            score_panel<V, 2, kStride>(queries, scratch.keys, num_keys, args.dim, nothing, scratch.scores);
        } else if (width == kLanes) {
            score_panel<V, 1, kStride>(queries, scratch.keys, num_keys, args.dim, nothing, scratch.scores);
        } else {
            score_panel<V8, 1, kStride>(queries, scratch.keys, num_keys, args.dim, nothing, scratch.scores);
        }
        for (int64_t head = 0; head < (left < width ? left : width); ++head) {
            const V16 weight = V16::set1(weights[first + head]);
            for (int i = 0; i < 4; ++i) {
                const V16 score = V16::load(scratch.scores + head * kBlockKeys + 16 * i);
                total[i] = fma(weight, max(score, V16::zero()), total[i]);
            }
        }
        first += width;
    }
    for (int i = 0; i < 4; ++i) total[i].store(scores + 16 * i);
}

}  // namespace

void index_rows(const krasis_index_args &args, const krasis_span &span, int64_t begin, int64_t end) {
    alignas(64) float y[kMostIndexDim];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t position = span.start + row - span.first_row;
        layer_norm(args, args.k + row * args.dim, y);
        turn_in_place(args, position, y);
        uint8_t *kept = static_cast<uint8_t *>(layer_values(args, span)) + position * row_bytes(args);
        store_part(args, y, 0, kept);
        if (args.gates) store_part(args, args.gates + row * args.dim, 1, kept);
        if (!args.q) continue;
        for (int64_t head = 0; head < args.heads; ++head) {
            turn_in_place(args, position, args.q + (row * args.heads + head) * args.dim);
        }
    }
}

void index_pools(const krasis_index_args &args, const krasis_span &span, int64_t begin, int64_t end) {
    alignas(64) float y[kMostIndexDim];
    const int64_t bytes = row_bytes(args);
    for (int64_t pool = begin; pool < end; ++pool) {
        uint8_t *first = static_cast<uint8_t *>(layer_values(args, span)) + pool * args.block * bytes;
        pool_key(args, first, y);
        store_part(args, y, 0, first + (args.block - 1) * bytes);
    }
}

void index_scores(const krasis_choose_args &args, const krasis_span &span, int64_t row, int64_t begin, int64_t end,
                  float *scores) {
    static_assert(kScoreBlock == kBlockKeys, "score_panel writes blocks of attention");
    ScoreScratch scratch;
    pack_heads(args, args.q + row * args.heads * args.dim, scratch.queries);
    const uint8_t *keys = static_cast<const uint8_t *>(layer_values(args, span));
    for (int64_t key = begin; key < end; key += kScoreBlock) {
        const int64_t num_keys = end - key < kScoreBlock ? end - key : kScoreBlock;
        const int64_t position = key * args.block + args.block - 1;
        load_keys(args, keys + position * row_bytes(args), num_keys, scratch.keys);
        score_block(args, args.weights + row * args.heads, num_keys, scratch, scores + key - begin);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
