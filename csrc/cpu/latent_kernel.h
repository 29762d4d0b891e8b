// latent_kernel.h: norm, rotation, cache write and quantisation of latent attention, compiled once per instruction set.
#pragma once

#include <type_traits>

#include "cache_bytes.h"
#include "latent.h"
#include "norm_sum.h"
#include "simd.h"
#include "spans.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

KRASIS_INLINE void put(V8 x, float *p) { x.store(p); }
KRASIS_INLINE void put(V8 x, uint16_t *p) { x.store_f16(p); }

float temperature(const krasis_latent_args &args, int64_t position) {
    if (args.temperature_scale == 0.0f) return 1.0f;
    const int64_t periods = (position + args.temperature_shift) / args.temperature_period;
    return 1.0f + args.temperature_scale * __builtin_logf(1.0f + static_cast<float>(periods));
}

// What of a head or key turns, times factor -> out [rope_dim].
void turn(const krasis_latent_args &args, const float *x, int64_t position, float factor, float *out) {
    const int64_t pairs = args.rotary_dims / 2;
    const float *cos = args.cos + position * pairs, *sin = args.sin + position * pairs;
    const bool halves = args.rope_style == KRASIS_ROPE_HALF;
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t first = halves ? i : 2 * i, second = halves ? pairs + i : 2 * i + 1;
        const float x1 = x[first] * factor, x2 = x[second] * factor;
        out[first] = __builtin_fmaf(-x2, sin[i], x1 * cos[i]);
        out[second] = __builtin_fmaf(x1, sin[i], x2 * cos[i]);
    }
    for (int64_t i = 2 * pairs; i < args.rope_dim; ++i) out[i] = x[i] * factor;
}

template <class Cache>
void store_key_of_floats(const krasis_latent_args &args, const float *kv, int64_t row, int64_t position, Cache *key) {
    const V8 inverse = V8::set1(inverse_rms(kv, args.kv_rank, args.eps));
    for (int64_t i = 0; i < args.kv_rank; i += 8) {
        put(mul(mul(V8::load(kv + i), inverse), V8::load(args.norm + i)), key + i);
    }
    constexpr int64_t kPiece = 16;
    // Turned in place of the row's first head of queries, which is written afterwards.
    float *turned = args.queries + row * args.num_heads * (args.kv_rank + args.rope_dim) + args.kv_rank;
    turn(args, kv + args.kv_rank, position, 1.0f, turned);
    for (int64_t i = 0; i < args.rope_dim; i += kPiece) {
        put(V8::load(turned + i), key + args.kv_rank + i);
        put(V8::load(turned + i + 8), key + args.kv_rank + i + 8);
    }
}

void store_key_of_bytes(const krasis_latent_args &args, const float *kv, int64_t position, int8_t *key) {
    alignas(64) float y[kMaxLatentBytes];
    const V8 inverse = V8::set1(inverse_rms(kv, args.kv_rank, args.eps));
    for (int64_t i = 0; i < args.kv_rank; i += 8) {
        mul(mul(V8::load(kv + i), inverse), V8::load(args.norm + i)).store(y + i);
    }
    turn(args, kv + args.kv_rank, position, 1.0f, y + args.kv_rank);
    int8_t *scales = key + args.kv_rank + args.rope_dim;
    store_bytes(y, args.kv_rank, key, scales);
    store_bytes(y + args.kv_rank, args.rope_dim, key + args.kv_rank, scales + kScaleBytes);
}

// The row's latent, normed, and the keys' common part, turned, into the cache.
template <class Cache>
void store_key(const krasis_latent_args &args, const krasis_span &span, int64_t row, int64_t position) {
    const float *kv = args.kv + row * args.ldkv;
    void *place = static_cast<uint8_t *>(layer_keys(args, span)) + position * row_bytes(args);
    if constexpr (std::is_same_v<Cache, int8_t>) {
        store_key_of_bytes(args, kv, position, static_cast<int8_t *>(place));
    } else {
        store_key_of_floats(args, kv, row, position, static_cast<Cache *>(place));
    }
}

void store_queries(const krasis_latent_args &args, int64_t row, int64_t position) {
    const float factor = temperature(args, position);
    const V8 factors = V8::set1(factor);
    const int64_t head_dim = args.nope_dim + args.rope_dim, blocks = args.nope_dim / KRASIS_BLOCK_K;
    for (int64_t head = 0; head < args.num_heads; ++head) {
        const int64_t index = row * args.num_heads + head;
        const float *q = args.q + row * args.ldq + head * head_dim;
        for (int64_t block = 0; block < blocks; ++block) {
            const float *x = q + block * KRASIS_BLOCK_K;
            const int64_t to = index * blocks + block;
            quantize_block(mul(V8::load(x), factors), mul(V8::load(x + 8), factors), mul(V8::load(x + 16), factors),
                           mul(V8::load(x + 24), factors), args.acts->q + to * KRASIS_BLOCK_K, args.acts->scale + to,
                           args.acts->sum + to);
        }
        float *query = args.queries + index * (args.kv_rank + args.rope_dim);
        turn(args, q + args.nope_dim, position, factor, query + args.kv_rank);
    }
}

}  // namespace

void latent_rows(const krasis_latent_args &args, const krasis_span &span, int64_t begin, int64_t end) {
    const auto store = args.kv_dtype == KRASIS_F16  ? store_key<uint16_t>
                       : args.kv_dtype == KRASIS_I8 ? store_key<int8_t>
                                                    : store_key<float>;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t position = span.start + row - span.first_row;
        store(args, span, row, position);
        store_queries(args, row, position);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
