// rope_kernel.h: head norm, rotary embedding and cache write, compiled once per instruction set.
#pragma once

#include "norm_sum.h"
#include "rope.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

KRASIS_INLINE void put(V8 x, float *p) { x.store(p); }
KRASIS_INLINE void put(V8 x, uint16_t *p) { x.store_f16(p); }

// One head: x [dim] -> out [dim]; weight null: no norm. x and out may be the same.
template <class Out>
void norm_rope_head(const float *x, const float *weight, float eps, const float *cos, const float *sin, int64_t dim,
                    Out *out) {
    const int64_t half = dim / 2;
    const V8 inverse = V8::set1(weight ? inverse_rms(x, dim, eps) : 1.0f);
    for (int64_t i = 0; i < half; i += 8) {
        V8 x1 = V8::load(x + i), x2 = V8::load(x + half + i);
        if (weight) {
            x1 = mul(mul(x1, inverse), V8::load(weight + i));
            x2 = mul(mul(x2, inverse), V8::load(weight + half + i));
        }
        const V8 c = V8::load(cos + i), s = V8::load(sin + i);
        put(fnma(x2, s, mul(x1, c)), out + i);
        put(fma(x1, s, mul(x2, c)), out + half + i);
    }
}

template <class Cache>
void rope_store_token(const krasis_qkv_args &args, int64_t token) {
    const int64_t dim = args.head_dim, position = args.start + token;
    float *q = args.qkv + token * (args.num_heads + 2 * args.num_kv_heads) * dim;
    const float *k = q + args.num_heads * dim, *v = k + args.num_kv_heads * dim;
    const float *cos = args.cos + position * (dim / 2), *sin = args.sin + position * (dim / 2);
    for (int64_t head = 0; head < args.num_heads; ++head) {
        float *x = q + head * dim;
        norm_rope_head(x, args.q_norm, args.eps, cos, sin, dim, x);
    }
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
        const int64_t slot = (head * args.capacity + position) * dim;
        norm_rope_head(k + head * dim, args.k_norm, args.eps, cos, sin, dim, static_cast<Cache *>(args.k_cache) + slot);
        Cache *values = static_cast<Cache *>(args.v_cache) + slot;
        for (int64_t i = 0; i < dim; i += 8) put(V8::load(v + head * dim + i), values + i);
    }
}

}  // namespace

void rope_store_tokens(const krasis_qkv_args &args, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        if (args.kv_dtype == KRASIS_F16) {
            rope_store_token<uint16_t>(args, token);
        } else {
            rope_store_token<float>(args, token);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
