// attention_rows.cu: what happens to rows around attention: RMSNorm; norm and rotation of q and k, storing of k and v.
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;
constexpr int kHeadThreads = 128, kMaxPairs = 4;  // a head of 256 is 128 pairs, four a lane
constexpr int kMaxHeadDim = 2 * 32 * kMaxPairs;

// The sum over a warp, in every lane, added in the same order whatever the launch.
KRASIS_DEVICE float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

// One block a token. shared: float [kNormWarps].
KRASIS_KERNEL(kNormThreads, 1)
rms_norm_kernel(const krasis_cuda_rms_norm_args p) {
    const int thread = static_cast<int>(simt::thread_x());
    const int64_t row = static_cast<int64_t>(simt::block_x()) * p.k;
    float square = 0;
    for (int64_t i = thread * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector];
        load8(p.x, row + i, p.x_dtype, values);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) square = simt::fused_multiply_add(values[j], values[j], square);
    }
    auto *sums = reinterpret_cast<float *>(simt::shared_memory());
    square = warp_sum(square);
    if (thread % 32 == 0) simt::shared_store(sums + thread / 32, square);
    simt::sync_threads();
    float total = 0;
    KRASIS_UNROLL
    for (int w = 0; w < kNormWarps; ++w) total += simt::shared_load<float>(sums + w);
    const float scale = simt::reciprocal_sqrt(total / static_cast<float>(p.k) + p.eps);
    for (int64_t i = thread * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector], weights[kVector];
        load8(p.x, row + i, p.x_dtype, values);
        load8(p.weight, i, p.weight_dtype, weights);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] = values[j] * scale * weights[j];
        store8(p.out, row + i, p.out_dtype, values);
    }
}

// One warp a head of a token: q heads, then k heads, then v heads.
KRASIS_KERNEL(kHeadThreads, 1)
qk_norm_rope_kernel(const krasis_cuda_qkv_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
    const int64_t item = static_cast<int64_t>(simt::block_x()) * (kHeadThreads / 32) + simt::thread_x() / 32;
    if (item >= p.tokens * heads) return;  // the whole warp
    const int64_t token = item / heads, head = item % heads;
    const int64_t position = (p.start_device ? *p.start_device : p.start) + token;
    // One given by the device could not be checked before the launch: nothing is written where it does not fit.
    if (position < 0 || position >= p.capacity || position >= p.max_positions) return;
    const int64_t at = item * p.head_dim;
    const bool is_q = head < p.num_heads, is_k = !is_q && head < p.num_heads + p.num_kv_heads;
    const int half = static_cast<int>(p.head_dim / 2);
    float low[kMaxPairs], high[kMaxPairs], square = 0;
    KRASIS_UNROLL
    for (int m = 0; m < kMaxPairs; ++m) {
        const int i = lane + 32 * m;
        low[m] = i < half ? load1(p.qkv, at + i, p.dtype) : 0;
        high[m] = i < half ? load1(p.qkv, at + half + i, p.dtype) : 0;
        square = simt::fused_multiply_add(low[m], low[m], simt::fused_multiply_add(high[m], high[m], square));
    }
    const void *norm = is_q ? p.q_norm : is_k ? p.k_norm : nullptr;
    const float scale = simt::reciprocal_sqrt(warp_sum(square) / static_cast<float>(p.head_dim) + p.eps);
    const int64_t kv_head = head - p.num_heads - (is_k ? 0 : p.num_kv_heads);
    void *to = is_q ? p.qkv : is_k ? p.k_cache : p.v_cache;
    const int64_t to_at = is_q ? at : (kv_head * p.capacity + position) * p.head_dim;
    KRASIS_UNROLL
    for (int m = 0; m < kMaxPairs; ++m) {
        const int i = lane + 32 * m;
        if (i >= half) continue;
        float x = low[m], y = high[m];
        if (norm) {
            x *= scale * load1(norm, i, p.norm_dtype);
            y *= scale * load1(norm, half + i, p.norm_dtype);
        }
        if (is_q || is_k) {
            const float c = p.cos[position * half + i], s = p.sin[position * half + i], turned = x * c - y * s;
            y = y * c + x * s;
            x = turned;
        }
        store1(to, to_at + i, p.dtype, x);
        store1(to, to_at + half + i, p.dtype, y);
    }
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
    return launch<rms_norm_kernel>({static_cast<unsigned>(a.tokens), kNormThreads, kNormWarps * sizeof(float)}, a,
                                   stream);
}

int32_t krasis_cuda_qk_norm_rope_store(const krasis_cuda_qkv_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_qkv_args &a = *args;
    const bool pointers = a.qkv && a.cos && a.sin && a.k_cache && a.v_cache;
    const int64_t start = a.start_device ? 0 : a.start;
    const bool counts = a.tokens >= 0 && start >= 0 && a.num_heads > 0 && a.num_kv_heads > 0 && a.head_dim > 0;
    if (!pointers || !counts || !is_16_bit(a.dtype) || !is_dtype(a.norm_dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.head_dim % 16 || a.head_dim > kMaxHeadDim) return KRASIS_ERR_SHAPE;
    if (start + a.tokens > a.max_positions || start + a.tokens > a.capacity) return KRASIS_ERR_RANGE;
    const int64_t warps = a.tokens * (a.num_heads + 2 * a.num_kv_heads), blocks = ceil_div(warps, kHeadThreads / 32);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return launch<qk_norm_rope_kernel>({static_cast<unsigned>(blocks), kHeadThreads, 0}, a, stream);
}
