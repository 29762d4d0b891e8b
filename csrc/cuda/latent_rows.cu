// latent_rows.cu: what happens to rows before latent attention: the latent's norm, rotation, the cache.
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Pair {
    float first, second;
};

KRASIS_DEVICE float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

KRASIS_DEVICE float temperature(const krasis_cuda_latent_args &p, int64_t position) {
    if (p.temperature_scale == 0.0f) return 1.0f;
    const int64_t periods = (position + p.temperature_shift) / p.temperature_period;
    return 1.0f + p.temperature_scale * simt::log1p_float(static_cast<float>(periods));
}

// Channels of pair i of the rotated part: neighbours, or one of each half.
KRASIS_DEVICE int first_of(const krasis_cuda_latent_args &p, int i) { return p.interleaved ? 2 * i : i; }
KRASIS_DEVICE int second_of(const krasis_cuda_latent_args &p, int i) {
    return p.interleaved ? 2 * i + 1 : static_cast<int>(p.rope_dim / 2) + i;
}

KRASIS_DEVICE Pair turned(const krasis_cuda_latent_args &p, int64_t position, int i, Pair x) {
    if (p.rotary_dims == 0) return x;
    const int64_t at = position * (p.rotary_dims / 2) + i;
    const float c = p.cos[at], s = p.sin[at];
    return {x.first * c - x.second * s, x.second * c + x.first * s};
}

// The row's latent, normed, and what all keys share, turned. One warp.
KRASIS_DEVICE void store_key(const krasis_cuda_latent_args &p, int64_t row, int64_t position, uint8_t *cache,
                             int lane) {
    const float *kv = p.kv + row * p.kv_stride;
    const int64_t at = position * (p.kv_rank + p.rope_dim);
    float square = 0;
    for (int i = lane; i < p.kv_rank; i += 32) square = simt::fused_multiply_add(kv[i], kv[i], square);
    const float scale = simt::reciprocal_sqrt(warp_sum(square) / static_cast<float>(p.kv_rank) + p.eps);
    for (int i = lane; i < p.kv_rank; i += 32) {
        store1(cache, at + i, p.dtype, kv[i] * scale * load1(p.norm, i, p.norm_dtype));
    }
    for (int i = lane; i < p.rope_dim / 2; i += 32) {
        const int first = first_of(p, i), second = second_of(p, i);
        const Pair pair = turned(p, position, i, {kv[p.kv_rank + first], kv[p.kv_rank + second]});
        store1(cache, at + p.kv_rank + first, p.dtype, pair.first);
        store1(cache, at + p.kv_rank + second, p.dtype, pair.second);
    }
}

// A head of the row's query. One warp.
KRASIS_DEVICE void turn_query(const krasis_cuda_latent_args &p, int64_t row, int64_t position, int64_t head, int lane) {
    const int64_t at = row * p.q_stride + head * (p.nope_dim + p.rope_dim), rest = at + p.nope_dim;
    const float factor = temperature(p, position);
    if (factor != 1.0f) {
        for (int i = lane; i < p.nope_dim; i += 32) {
            store1(p.q, at + i, p.dtype, load1(p.q, at + i, p.dtype) * factor);
        }
    }
    for (int i = lane; i < p.rope_dim / 2; i += 32) {
        const int first = first_of(p, i), second = second_of(p, i);
        const Pair pair = turned(
            p, position, i, {load1(p.q, rest + first, p.dtype) * factor, load1(p.q, rest + second, p.dtype) * factor});
        store1(p.q, rest + first, p.dtype, pair.first);
        store1(p.q, rest + second, p.dtype, pair.second);
    }
}

// A warp a head of a row's query, and one more for its key.
KRASIS_KERNEL(kThreads, 1)
latent_store_kernel(const krasis_cuda_latent_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    const int64_t item = static_cast<int64_t>(simt::block_x()) * kWarps + simt::thread_x() / 32;
    const int64_t row = item / (p.num_heads + 1), head = item % (p.num_heads + 1);
    if (row >= p.tokens) return;  // the whole warp
    const int64_t position = p.rows ? p.rows[row].position : p.start + row;
    // One given by the device could not be checked before the launch: nothing is written where it does not fit.
    if (position < 0 || position >= p.capacity || (p.rotary_dims && position >= p.max_positions)) return;
    if (head < p.num_heads) {
        turn_query(p, row, position, head, lane);
        return;
    }
    uint8_t *cache =
        p.rows ? static_cast<uint8_t *>(p.rows[row].keys) + p.keys_offset : static_cast<uint8_t *>(p.cache);
    store_key(p, row, position, cache, lane);
}

int32_t check(const krasis_cuda_latent_args &a) {
    const bool tables = (a.cos && a.sin) || a.rotary_dims == 0;
    const bool counts = a.tokens >= 0 && a.num_heads > 0 && a.nope_dim > 0 && a.rope_dim >= 0 && a.kv_rank > 0;
    if (!a.q || !a.kv || !a.norm || !tables || !counts || !(a.rows || a.cache)) return KRASIS_ERR_ARGUMENT;
    if (!is_16_bit(a.dtype) || !is_dtype(a.norm_dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.temperature_scale != 0 && (a.temperature_period <= 0 || a.temperature_shift < 0)) return KRASIS_ERR_ARGUMENT;
    if (a.rope_dim % 2 || a.kv_rank > INT32_MAX || a.nope_dim > INT32_MAX) return KRASIS_ERR_SHAPE;
    if (a.rotary_dims != 0 && a.rotary_dims != a.rope_dim) return KRASIS_ERR_SHAPE;
    if (a.q_stride < a.num_heads * (a.nope_dim + a.rope_dim) || a.kv_stride < a.kv_rank + a.rope_dim)
        return KRASIS_ERR_SHAPE;
    if (a.rows) return KRASIS_OK;
    const int64_t end = a.start + a.tokens;
    const bool inside = a.start >= 0 && end <= a.capacity && (a.rotary_dims == 0 || end <= a.max_positions);
    return inside ? KRASIS_OK : KRASIS_ERR_RANGE;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_latent_store(const krasis_cuda_latent_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_latent_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK) return status;
    const int64_t blocks = ceil_div(a.tokens * (a.num_heads + 1), kWarps);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return launch<latent_store_kernel>({static_cast<unsigned>(blocks), kThreads, 0}, a, stream);
}
