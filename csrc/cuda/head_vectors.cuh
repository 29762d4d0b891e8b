// head_vectors.cuh: norm, rotation and storing of heads of 64, 128, 256 or 512 channels, 16 bytes at a time. The bits
// are those of one warp a head (attention_rows.cu), which takes every shape: sums of squares are added in its order.
#pragma once

#include "qkv_place.cuh"
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {

// One head of a token in kLanes lanes: each has eight neighbouring pairs of channels.
template <int kLanes, bool kRing>
struct VectorHead {
    static constexpr int kRounds = kLanes / 4;

    const krasis_cuda_qkv_args &p;
    int64_t head, source, at;  // as in Head
    int lane, pair, first, second;
    bool is_q, is_k, is_turned;
    float low[kVector], high[kVector];

    KRASIS_DEVICE VectorHead(const krasis_cuda_qkv_args &params, int64_t token, int64_t index)
        : p(params), head(index), lane(static_cast<int>(simt::thread_x() % kLanes)) {
        const int half = static_cast<int>(p.head_dim / 2), num_rotated = static_cast<int>(p.rotary_dims / 2);
        pair = kVector * lane;
        is_turned = pair < num_rotated;
        first = is_turned ? pair : num_rotated + pair;
        second = is_turned ? num_rotated + pair : half + pair;
        is_q = head < p.num_heads;
        is_k = !is_q && head < p.num_heads + p.num_kv_heads;
        source = p.shared_kv && !is_q && !is_k ? head - p.num_kv_heads : head;
        at = (token * (p.num_heads + (p.shared_kv ? 1 : 2) * p.num_kv_heads) + source) * p.head_dim;
    }

    KRASIS_DEVICE void load() {
        load8(p.qkv, at + first, p.dtype, low);
        load8(p.qkv, at + second, p.dtype, high);
        if (p.bias == nullptr) return;
        float to_low[kVector], to_high[kVector];
        load8(p.bias, source * p.head_dim + first, KRASIS_F32, to_low);
        load8(p.bias, source * p.head_dim + second, KRASIS_F32, to_high);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) {
            low[j] += to_low[j];
            high[j] += to_high[j];
        }
    }

    // The sum of squares, in every lane. One warp a head adds pairs 32 apart in each lane first: here they lie four
    // lanes apart. Then it adds lanes 16, 8, 4, 2 and 1 apart: here 2 and 1 lanes apart, then four, two and one
    // elements.
    KRASIS_DEVICE float square_sum() const {
        float squares[kVector] = {};
        KRASIS_UNROLL
        for (int m = 0; m < kRounds; ++m) {
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) {
                squares[j] =
                    simt::fused_multiply_add(low[j], low[j], simt::fused_multiply_add(high[j], high[j], squares[j]));
                // To the next four lanes, where the sum goes on.
                if (m + 1 < kRounds) squares[j] = simt::shuffle_xor(squares[j], 4 * (m ^ (m + 1)));
            }
        }
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) {
            squares[j] += simt::shuffle_xor(squares[j], 2);
            squares[j] += simt::shuffle_xor(squares[j], 1);
        }
        const float even = squares[0] + squares[4] + (squares[2] + squares[6]);
        const float odd = squares[1] + squares[5] + (squares[3] + squares[7]);
        const int head_lane = static_cast<int>(simt::thread_x() % 32) / kLanes * kLanes;
        return simt::shuffle(even + odd, head_lane + kLanes - 1);  // of the last four lanes
    }

    KRASIS_DEVICE static float cut(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

    // scale: of the norm, one over the root of the mean square.
    KRASIS_DEVICE void finish(int64_t position, float scale) {
        const void *weights = is_q ? p.q_norm : is_k ? p.k_norm : nullptr;
        if (weights) {
            float to_low[kVector], to_high[kVector];
            load8(weights, first, p.norm_dtype, to_low);
            load8(weights, second, p.norm_dtype, to_high);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) {
                low[j] *= scale * to_low[j];
                high[j] *= scale * to_high[j];
            }
        } else if (p.value_norm && !is_q && !is_k) {
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) {
                low[j] *= scale;
                high[j] *= scale;
            }
        }
        if (p.clip > 0) {
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) {
                low[j] = cut(low[j], p.clip);
                high[j] = cut(high[j], p.clip);
            }
        }
        if (is_turned && (is_q || is_k)) turn(position);
    }

    KRASIS_DEVICE void turn(int64_t position) {
        const int64_t table = position * (p.rotary_dims / 2) + pair;
        float c[kVector], s[kVector];
        load8(p.cos, table, KRASIS_F32, c);
        load8(p.sin, table, KRASIS_F32, s);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) turn_pair(c[j], s[j], low[j], high[j]);
    }

    // To where it belongs.
    KRASIS_DEVICE void store(const Place &place) const {
        const int64_t number = head - p.num_heads - (is_k ? 0 : p.num_kv_heads);
        void *to = is_q ? p.qkv : is_k ? place.keys : place.values;
        const int64_t to_at = is_q ? at : entry_of<kRing>(p, number, place.position) * p.head_dim;
        store8(to, to_at + first, p.dtype, low);
        store8(to, to_at + second, p.dtype, high);
    }
};

// shared: none.
template <int kLanes, bool kRing>
KRASIS_KERNEL(kHeadThreads, 1)
qk_norm_rope_vectors_kernel(const krasis_cuda_qkv_args p) {
    simt::follow();
    const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
    const int64_t item = static_cast<int64_t>(simt::block_x()) * (kHeadThreads / kLanes) + simt::thread_x() / kLanes;
    const bool exists = item < p.tokens * heads;
    const int64_t own = exists ? item : 0;  // every lane takes part in sums
    const Place place = place_of(p, own / heads);
    VectorHead<kLanes, kRing> head(p, own / heads, own % heads);
    head.load();
    const float scale = simt::reciprocal_sqrt(head.square_sum() / static_cast<float>(p.head_dim) + p.eps);
    if (!exists || !fits(p, place.position)) return;
    head.finish(place.position, scale);
    head.store(place);
}

// Whether these kernels take it. What addresses point to in rows is aligned as the caches are.
inline bool has_vectors(const krasis_cuda_qkv_args &a) {
    const int64_t lanes = a.head_dim / (2 * kVector);
    const bool shape = a.head_dim % (2 * kVector) == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32);
    const bool plain = a.norm_kind == KRASIS_CUDA_NORM_HEAD && !a.interleaved && a.kv_dtype != KRASIS_I8;
    const bool aligned = is_aligned(a.qkv) && is_aligned(a.q_norm) && is_aligned(a.k_norm) && is_aligned(a.cos) &&
                         is_aligned(a.sin) && is_aligned(a.bias) && is_aligned(a.k_cache) && is_aligned(a.v_cache);
    return shape && plain && aligned && a.rotary_dims % (2 * kVector) == 0;
}

template <bool kRing>
int32_t launch_vectors(const krasis_cuda_qkv_args &a, void *stream) {
    const int64_t lanes = a.head_dim / (2 * kVector);
    const int64_t blocks = ceil_div(a.tokens * (a.num_heads + 2 * a.num_kv_heads), kHeadThreads / lanes);
    const simt::LaunchShape shape{static_cast<unsigned>(blocks), kHeadThreads, 0};
    switch (lanes) {
        case 4:
            return launch_rows<qk_norm_rope_vectors_kernel<4, kRing>>(a.tokens, shape, a, stream);
        case 8:
            return launch_rows<qk_norm_rope_vectors_kernel<8, kRing>>(a.tokens, shape, a, stream);
        case 16:
            return launch_rows<qk_norm_rope_vectors_kernel<16, kRing>>(a.tokens, shape, a, stream);
        default:
            return launch_rows<qk_norm_rope_vectors_kernel<32, kRing>>(a.tokens, shape, a, stream);
    }
}

}  // namespace krasis::cuda
