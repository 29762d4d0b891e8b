// rope_kernel.h: bias, norm, rotary embedding and cache write, compiled once per instruction set.
#pragma once

#include <type_traits>

#include "cache_bytes.h"
#include "norm_sum.h"
#include "rope.h"
#include "simd.h"
#include "spans.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

KRASIS_INLINE void put(V8 x, float *p) { x.store(p); }
KRASIS_INLINE void put(V8 x, uint16_t *p) { x.store_f16(p); }

// One head as it is read: normed and cut, where that is asked for.
template <bool kNorm, bool kClip>
struct Head {
    const float *x, *weight;  // [head_dim]
    V8 inverse;
    float clip;

    KRASIS_INLINE V8 at(int64_t i) const {
        V8 y = V8::load(x + i);
        if constexpr (kNorm) y = mul(mul(y, inverse), V8::load(weight + i));
        if constexpr (kClip) y = max(V8::set1(-clip), min(V8::set1(clip), y));  // a NaN stays one
        return y;
    }
};

// Channels [begin, dim) of a head -> out.
template <class In, class Out>
KRASIS_INLINE void copy_head(const In &head, int64_t begin, int64_t dim, Out *out) {
    for (int64_t i = begin; i < dim; i += 8) put(head.at(i), out + i);
}

// Pairs (x1[i], x2[i]) of the angle whose cosine and sine are given -> the same places, one at a time.
KRASIS_INLINE void turn(float &x1, float &x2, float cos, float sin) {
    const float first = __builtin_fmaf(-x2, sin, x1 * cos);
    x2 = __builtin_fmaf(x1, sin, x2 * cos);
    x1 = first;
}

// Turns what 8 channels at a time cannot: pairs that lie side by side, or halves of another size.
template <class In, class Out>
void turn_slowly(const In &head, const krasis_qkv_args &args, const float *cos, const float *sin, Out *out) {
    alignas(64) float y[kMaxHeadDim];
    const int64_t pairs = args.rotary_dims / 2;
    copy_head(head, 0, args.head_dim, y);
    const bool halves = args.rope_style == KRASIS_ROPE_HALF;
    for (int64_t i = 0; i < pairs; ++i) turn(y[halves ? i : 2 * i], y[halves ? pairs + i : 2 * i + 1], cos[i], sin[i]);
    for (int64_t i = 0; i < args.head_dim; i += 8) put(V8::load(y + i), out + i);
}

// One head -> out [head_dim], which may be where it is read from.
template <class In, class Out>
KRASIS_INLINE void turn_head(const In &head, const krasis_qkv_args &args, const float *cos, const float *sin,
                             Out *out) {
    const int64_t half = args.rotary_dims / 2;
    if (half == 0) return copy_head(head, 0, args.head_dim, out);
    if (args.rope_style != KRASIS_ROPE_HALF || half % 8 != 0) return turn_slowly(head, args, cos, sin, out);
    for (int64_t i = 0; i < half; i += 8) {
        const V8 x1 = head.at(i), x2 = head.at(half + i);
        const V8 c = V8::load(cos + i), s = V8::load(sin + i);
        put(fnma(x2, s, mul(x1, c)), out + i);
        put(fma(x1, s, mul(x2, c)), out + half + i);
    }
    copy_head(head, args.rotary_dims, args.head_dim, out);
}

// The same with the norm of what was turned, whose length the tables' factor may have changed.
template <class In, class Out>
void turn_head_then_norm(const In &head, const float *weight, const krasis_qkv_args &args, const float *cos,
                         const float *sin, Out *out) {
    alignas(64) float y[kMaxHeadDim];
    turn_head(head, args, cos, sin, y);
    const V8 inverse = V8::set1(inverse_rms(y, args.head_dim, args.eps));
    for (int64_t i = 0; i < args.head_dim; i += 8)
        put(mul(mul(V8::load(y + i), inverse), V8::load(weight + i)), out + i);
}

// num_heads heads of q or k; out_of(head) says where a head goes.
template <bool kNorm, bool kClip, class F>
KRASIS_INLINE void turn_heads(const krasis_qkv_args &args, const float *x, int64_t num_heads, const float *weight,
                              int64_t position, F &&out_of) {
    const int64_t dim = args.head_dim, offset = position * (args.rotary_dims / 2);
    const float *cos = args.cos + offset, *sin = args.sin + offset;
    const bool flat = args.norm == KRASIS_QK_NORM_FLAT;
    const float of_all = kNorm && flat ? inverse_rms(x, num_heads * dim, args.eps) : 1.0f;
    if (args.norm == KRASIS_QK_NORM_HEAD_AFTER) {
        for (int64_t i = 0; i < num_heads; ++i, x += dim) {
            const Head<false, kClip> head{x, nullptr, V8::zero(), args.clip};
            turn_head_then_norm(head, weight, args, cos, sin, out_of(i));
        }
        return;
    }
    for (int64_t i = 0; i < num_heads; ++i, x += dim) {
        Head<kNorm, kClip> head{x, weight, V8::set1(of_all), args.clip};
        if (kNorm && flat) weight += dim;
        if (kNorm && !flat) head.inverse = V8::set1(inverse_rms(x, dim, args.eps));
        turn_head(head, args, cos, sin, out_of(i));
    }
}

// v's head as it is kept -> out, which may be where it is read from.
template <bool kClip, class Out>
KRASIS_INLINE void value_head(const krasis_qkv_args &args, const float *v, Out *out) {
    const Head<false, kClip> head{v, nullptr, V8::zero(), args.clip};
    const V8 inverse = V8::set1(args.value_norm ? inverse_rms(v, args.head_dim, args.eps) : 1.0f);
    for (int64_t d = 0; d < args.head_dim; d += 8) put(mul(head.at(d), inverse), out + d);
}

// A row's q in place; k and v to the cache by way of floats: v first, for it may be k as it came.
template <bool kNorm, bool kClip>
void store_row_of_bytes(const krasis_qkv_args &args, const krasis_span &span, int64_t position, float *q, float *k,
                        const float *v) {
    alignas(64) float y[kMaxHeadDim];
    const int64_t dim = args.head_dim, bytes = row_bytes(args);
    const int64_t offset = row_of(args, position) * bytes, stride = args.capacity * bytes;
    int8_t *keys = static_cast<int8_t *>(layer_keys(args, span)) + offset;
    int8_t *values = static_cast<int8_t *>(layer_values(args, span)) + offset;
    for (int64_t i = 0; i < args.num_kv_heads; ++i) {
        value_head<kClip>(args, v + i * dim, y);
        store_bytes(y, dim, values + i * stride, values + i * stride + dim);
    }
    turn_heads<kNorm, kClip>(args, q, args.num_heads, args.q_norm, position, [&](int64_t i) { return q + i * dim; });
    turn_heads<kNorm, kClip>(args, k, args.num_kv_heads, args.k_norm, position, [&](int64_t i) { return k + i * dim; });
    for (int64_t i = 0; i < args.num_kv_heads; ++i) {
        store_bytes(k + i * dim, dim, keys + i * stride, keys + i * stride + dim);
    }
}

// The same with keys and values of floats, which go to the cache as they are turned.
template <class Cache, bool kNorm, bool kClip>
void store_row_of_floats(const krasis_qkv_args &args, const krasis_span &span, int64_t position, float *q,
                         const float *k, const float *v) {
    const int64_t dim = args.head_dim, stride = args.capacity * dim, offset = row_of(args, position) * dim;
    Cache *keys = static_cast<Cache *>(layer_keys(args, span)) + offset;
    Cache *values = static_cast<Cache *>(layer_values(args, span)) + offset;
    turn_heads<kNorm, kClip>(args, q, args.num_heads, args.q_norm, position, [&](int64_t i) { return q + i * dim; });
    turn_heads<kNorm, kClip>(args, k, args.num_kv_heads, args.k_norm, position,
                             [&](int64_t i) { return keys + i * stride; });
    for (int64_t i = 0; i < args.num_kv_heads; ++i) value_head<kClip>(args, v + i * dim, values + i * stride);
}

template <class Cache, bool kNorm, bool kClip>
void rope_store_row(const krasis_qkv_args &args, const krasis_span &span, int64_t row) {
    const int64_t dim = args.head_dim, position = span.start + row - span.first_row, size = qkv_size(args);
    float *q = args.qkv + row * size;
    if (args.bias) {
        for (int64_t i = 0; i < size; i += 8) add(V8::load(q + i), V8::load(args.bias + i)).store(q + i);
    }
    float *k = q + args.num_heads * dim, *v = args.shared_kv ? k : k + args.num_kv_heads * dim;
    if constexpr (std::is_same_v<Cache, int8_t>) {
        store_row_of_bytes<kNorm, kClip>(args, span, position, q, k, v);
    } else {
        store_row_of_floats<Cache, kNorm, kClip>(args, span, position, q, k, v);
    }
}

template <class Cache>
KRASIS_INLINE auto row_function(const krasis_qkv_args &args) {
    const bool norms = args.norm != KRASIS_QK_NORM_NONE, clips = args.clip > 0.0f;
    if (norms) return clips ? rope_store_row<Cache, true, true> : rope_store_row<Cache, true, false>;
    return clips ? rope_store_row<Cache, false, true> : rope_store_row<Cache, false, false>;
}

}  // namespace

void rope_store_rows(const krasis_qkv_args &args, const krasis_span &span, int64_t begin, int64_t end) {
    const auto store = args.kv_dtype == KRASIS_F16  ? row_function<uint16_t>(args)
                       : args.kv_dtype == KRASIS_I8 ? row_function<int8_t>(args)
                                                    : row_function<float>(args);
    for (int64_t row = begin; row < end; ++row) store(args, span, row);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
