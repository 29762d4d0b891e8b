// attention_rows.cu: what happens to rows around attention: RMSNorm; norm and rotation of q and k, storing of k and v.
#include "head_vectors.cuh"
#include "qkv_place.cuh"
#include "row_norm.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kPairs = 4, kMostPairs = 8;  // a head of 256 is 128 pairs, four a lane
constexpr int kHeadDim = 2 * 32 * kPairs, kMaxHeadDim = 2 * 32 * kMostPairs;
constexpr int kFlatThreads = 256;
constexpr int64_t kMaxNormedHeads = 8192;

// One block a token. shared: float [kNormWarps].
KRASIS_KERNEL(kNormThreads, 1)
rms_norm_kernel(const krasis_cuda_rms_norm_args p) {
    simt::follow();
    const int64_t row = static_cast<int64_t>(simt::block_x()) * p.k;
    auto *sums = reinterpret_cast<float *>(simt::shared_memory());
    const float scale = row_scale(p.x, row, p.k, p.x_dtype, p.eps, sums);
    for (int64_t i = static_cast<int64_t>(simt::thread_x()) * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector];
        load_normed8(p.x, row, i, p.x_dtype, p.weight, p.weight_dtype, scale, values);
        store8(p.out, row + i, p.out_dtype, values);
    }
}

// One head of a token in one warp, as pairs of channels: q heads, then k heads, then v heads (shared_kv: k's once
// more).
template <int kMaxPairs, bool kRing>
struct Head {
    const krasis_cuda_qkv_args &p;
    int64_t head, source, at;  // source: the head in a row of qkv; at: its first channel in qkv
    int lane, half, num_rotated;
    bool is_q, is_k;
    float low[kMaxPairs], high[kMaxPairs];

    KRASIS_DEVICE Head(const krasis_cuda_qkv_args &params, int64_t token, int64_t index) : p(params), head(index) {
        lane = static_cast<int>(simt::thread_x() % 32);
        half = static_cast<int>(p.head_dim / 2);
        num_rotated = static_cast<int>(p.rotary_dims / 2);
        is_q = head < p.num_heads;
        is_k = !is_q && head < p.num_heads + p.num_kv_heads;
        source = p.shared_kv && !is_q && !is_k ? head - p.num_kv_heads : head;
        at = (token * (p.num_heads + (p.shared_kv ? 1 : 2) * p.num_kv_heads) + source) * p.head_dim;
    }

    // The channels of pair i: those that are turned together first, then what is left.
    KRASIS_DEVICE int first(int i) const { return p.interleaved ? 2 * i : i < num_rotated ? i : num_rotated + i; }
    KRASIS_DEVICE int second(int i) const {
        return p.interleaved ? 2 * i + 1 : i < num_rotated ? num_rotated + i : half + i;
    }

    KRASIS_DEVICE float channel(int i) const {
        const float value = load1(p.qkv, at + i, p.dtype);
        return p.bias ? value + p.bias[source * p.head_dim + i] : value;
    }

    // Returns this lane's part of the sum of squares.
    KRASIS_DEVICE float load() {
        float square = 0;
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            const int i = lane + 32 * m;
            low[m] = i < half ? channel(first(i)) : 0;
            high[m] = i < half ? channel(second(i)) : 0;
            square = simt::fused_multiply_add(low[m], low[m], simt::fused_multiply_add(high[m], high[m], square));
        }
        return square;
    }

    // Cuts and turns q or k before its norm. Returns this lane's part of the sum of squares then.
    KRASIS_DEVICE float turn_first(const Place &place) {
        float square = 0;
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            low[m] = cut(low[m]);
            high[m] = cut(high[m]);
            turn(place, lane + 32 * m, low[m], high[m]);
            square = simt::fused_multiply_add(low[m], low[m], simt::fused_multiply_add(high[m], high[m], square));
        }
        return square;
    }

    KRASIS_DEVICE void turn(const Place &place, int i, float &x, float &y) const {
        if (i >= num_rotated) return;
        const int64_t table = place.position * num_rotated + i;
        turn_pair(p.cos[table], p.sin[table], x, y);
    }

    KRASIS_DEVICE const void *norm() const { return is_q ? p.q_norm : is_k ? p.k_norm : nullptr; }

    // Whether this head is normed after the rotation.
    KRASIS_DEVICE bool norms_after() const { return p.norm_kind == KRASIS_CUDA_NORM_HEAD_AFTER && norm(); }

    KRASIS_DEVICE float cut(float x) const {
        if (!(p.clip > 0)) return x;
        return x > p.clip ? p.clip : x < -p.clip ? -p.clip : x;
    }

    // Among those of its kind.
    KRASIS_DEVICE int64_t number() const { return is_q ? head : head - p.num_heads - (is_k ? 0 : p.num_kv_heads); }

    // scale: of the norm, one over the root of the mean square. Channels that a lane does not have stay 0.
    KRASIS_DEVICE void finish(const Place &place, float scale) {
        const void *weights = norm();
        const int64_t weights_at = p.norm_kind == KRASIS_CUDA_NORM_FLAT ? number() * p.head_dim : 0;
        const bool is_turned = norms_after();
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            const int i = lane + 32 * m;
            if (i >= half) continue;
            float &x = low[m], &y = high[m];
            if (weights) {
                x *= scale * load1(weights, weights_at + first(i), p.norm_dtype);
                y *= scale * load1(weights, weights_at + second(i), p.norm_dtype);
            } else if (p.value_norm && !is_q && !is_k) {
                x *= scale;
                y *= scale;
            }
            if (!is_turned) {
                x = cut(x);
                y = cut(y);
                if (is_q || is_k) turn(place, i, x, y);
            }
        }
    }

    // Of a head.
    KRASIS_DEVICE int64_t num_places() const { return kRing ? p.ring : p.capacity; }

    // To where it belongs.
    KRASIS_DEVICE void store(const Place &place) const {
        void *to = is_q ? p.qkv : is_k ? place.keys : place.values;
        const int64_t row = entry_of<kRing>(p, number(), place.position);
        if (!is_q && p.kv_dtype == KRASIS_I8) return store_codes(static_cast<uint8_t *>(to), row);
        const int64_t to_at = is_q ? at : row * p.head_dim;
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            const int i = lane + 32 * m;
            if (i >= half) continue;
            store1(to, to_at + first(i), p.dtype, low[m]);
            store1(to, to_at + second(i), p.dtype, high[m]);
        }
    }

    // Bits of magnitudes are compared, so that what is no number is in the scale.
    KRASIS_DEVICE void store_codes(uint8_t *to, int64_t row) const {
        uint32_t largest = 0;
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            const uint32_t x = float_bits(low[m]) & 0x7fffffffu, y = float_bits(high[m]) & 0x7fffffffu;
            largest = x > largest ? x : largest;
            largest = y > largest ? y : largest;
        }
        KRASIS_UNROLL
        for (int distance = 16; distance; distance /= 2) {
            const uint32_t other = simt::shuffle_xor(largest, distance);
            largest = other > largest ? other : largest;
        }
        const float scale = simt::divide(bits_float(largest), 127.0f);
        if (lane == 0) reinterpret_cast<float *>(to + p.num_kv_heads * num_places() * p.head_dim)[row] = scale;
        to += row * p.head_dim;
        KRASIS_UNROLL
        for (int m = 0; m < kMaxPairs; ++m) {
            const int i = lane + 32 * m;
            if (i >= half) continue;
            to[first(i)] = code(low[m], scale);
            to[second(i)] = code(high[m], scale);
        }
    }

    // The bits of an int8.
    KRASIS_DEVICE static uint8_t code(float x, float scale) {
        if (scale == 0.0f) return 0;
        const float nearest = simt::round_even(simt::divide(x, scale));
        const float whole = nearest < 127.0f ? (nearest > -127.0f ? nearest : -127.0f) : 127.0f;
        return static_cast<uint8_t>(static_cast<int8_t>(whole));
    }
};

// One warp a head of a token, each normed by itself.
template <int kMaxPairs, bool kRing>
KRASIS_KERNEL(kHeadThreads, 1)
qk_norm_rope_kernel(const krasis_cuda_qkv_args p) {
    simt::follow();
    const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
    const int64_t item = static_cast<int64_t>(simt::block_x()) * (kHeadThreads / 32) + simt::thread_x() / 32;
    if (item >= p.tokens * heads) return;  // the whole warp
    const Place place = place_of(p, item / heads);
    if (!fits(p, place.position)) return;
    Head<kMaxPairs, kRing> head(p, item / heads, item % heads);
    float square = head.load();
    if (head.norms_after()) square = head.turn_first(place);
    const float scale = simt::reciprocal_sqrt(warp_sum(square) / static_cast<float>(p.head_dim) + p.eps);
    head.finish(place, scale);
    head.store(place);
}

// One block a token: the norms of q and k see all of their heads. shared: float [num_heads + num_kv_heads].
template <bool kRing>
KRASIS_KERNEL(kFlatThreads, 1)
qk_flat_norm_rope_kernel(const krasis_cuda_qkv_args p) {
    simt::follow();
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t token = simt::block_x(), normed = p.num_heads + p.num_kv_heads;
    const Place place = place_of(p, token);
    if (!fits(p, place.position)) return;  // the whole block
    auto *squares = reinterpret_cast<float *>(simt::shared_memory());
    for (int64_t index = warp; index < normed; index += kFlatThreads / 32) {
        Head<kPairs, kRing> head(p, token, index);
        const float square = warp_sum(head.load());
        if (lane == 0) simt::shared_store(squares + index, square);
    }
    simt::sync_threads();
    float sum_q = 0, sum_k = 0;
    for (int64_t index = lane; index < normed; index += 32) {
        (index < p.num_heads ? sum_q : sum_k) += simt::shared_load<float>(squares + index);
    }
    const auto scale_of = [&](float sum, int64_t heads) {
        return simt::reciprocal_sqrt(warp_sum(sum) / static_cast<float>(heads * p.head_dim) + p.eps);
    };
    const float scale_q = scale_of(sum_q, p.num_heads), scale_k = scale_of(sum_k, p.num_kv_heads);
    for (int64_t index = warp; index < normed + p.num_kv_heads; index += kFlatThreads / 32) {
        Head<kPairs, kRing> head(p, token, index);
        head.load();
        head.finish(place, head.is_q ? scale_q : scale_k);
        head.store(place);
    }
}

int32_t check_qkv(const krasis_cuda_qkv_args &a) {
    const bool tables = (a.cos && a.sin) || a.rotary_dims == 0;
    const bool caches = a.rows || (a.k_cache && a.v_cache);
    const int64_t start = a.start_device || a.rows ? 0 : a.start;
    const bool counts = a.tokens >= 0 && start >= 0 && a.num_heads > 0 && a.num_kv_heads > 0 && a.head_dim > 0;
    const bool kinds = a.norm_kind == KRASIS_CUDA_NORM_HEAD || a.norm_kind == KRASIS_CUDA_NORM_FLAT ||
                       a.norm_kind == KRASIS_CUDA_NORM_HEAD_AFTER;
    if (!a.qkv || !tables || !caches || !counts || !kinds || !is_16_bit(a.dtype) || !is_dtype(a.norm_dtype))
        return KRASIS_ERR_ARGUMENT;
    if (a.kv_dtype != 0 && a.kv_dtype != KRASIS_I8) return KRASIS_ERR_ARGUMENT;
    const bool flat = a.norm_kind == KRASIS_CUDA_NORM_FLAT && (a.q_norm || a.k_norm);
    if (flat && (a.shared_kv || a.value_norm || a.head_dim > kHeadDim)) return KRASIS_ERR_SHAPE;
    if (a.head_dim % 16 || a.head_dim > kMaxHeadDim || a.num_heads + a.num_kv_heads > kMaxNormedHeads)
        return KRASIS_ERR_SHAPE;
    if (a.rotary_dims < 0 || a.rotary_dims % 2 || a.rotary_dims > a.head_dim) return KRASIS_ERR_SHAPE;
    if (a.keys_offset % 16 || a.values_offset % 16) return KRASIS_ERR_SHAPE;
    if (a.ring < 0) return KRASIS_ERR_ARGUMENT;
    if (a.rows) return KRASIS_OK;
    if (a.ring > 0 && a.tokens > a.ring) return KRASIS_ERR_RANGE;
    return start + a.tokens > a.max_positions || start + a.tokens > a.capacity ? KRASIS_ERR_RANGE : KRASIS_OK;
}

template <bool kRing>
int32_t launch_heads(const krasis_cuda_qkv_args &a, int64_t blocks, void *stream) {
    if (a.norm_kind == KRASIS_CUDA_NORM_FLAT && (a.q_norm || a.k_norm)) {
        const size_t shared_bytes = static_cast<size_t>(a.num_heads + a.num_kv_heads) * sizeof(float);
        return launch_rows<qk_flat_norm_rope_kernel<kRing>>(
            a.tokens, {static_cast<unsigned>(a.tokens), kFlatThreads, shared_bytes}, a, stream);
    }
    if (has_vectors(a)) return launch_vectors<kRing>(a, stream);
    const simt::LaunchShape shape{static_cast<unsigned>(blocks), kHeadThreads, 0};
    return a.head_dim > kHeadDim ? launch_rows<qk_norm_rope_kernel<kMostPairs, kRing>>(a.tokens, shape, a, stream)
                                 : launch_rows<qk_norm_rope_kernel<kPairs, kRing>>(a.tokens, shape, a, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_rms_norm(const krasis_cuda_rms_norm_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_rms_norm_args &a = *args;
    const bool kinds = is_dtype(a.x_dtype) && is_dtype(a.weight_dtype) && is_dtype(a.out_dtype);
    if (!kinds || !a.x || !a.weight || !a.out || a.tokens < 0 || a.tokens > kMaxBlocks || a.k <= 0)
        return KRASIS_ERR_ARGUMENT;
    if (a.k % kVector || !is_aligned(a.x) || !is_aligned(a.weight) || !is_aligned(a.out)) return KRASIS_ERR_SHAPE;
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(a.tokens), kNormThreads, kNormWarps * sizeof(float)};
    return launch_rows<rms_norm_kernel>(a.tokens, shape, a, stream);
}

int32_t krasis_cuda_qk_norm_rope_store(const krasis_cuda_qkv_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_qkv_args &a = *args;
    const int32_t status = check_qkv(a);
    if (status != KRASIS_OK) return status;
    const int64_t warps = a.tokens * (a.num_heads + 2 * a.num_kv_heads), blocks = ceil_div(warps, kHeadThreads / 32);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return a.ring ? launch_heads<true>(a, blocks, stream) : launch_heads<false>(a, blocks, stream);
}
