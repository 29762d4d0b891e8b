// attention_decode.cu: checks, choice of tile and launch of attention for few queries.
#include <algorithm>

#include "attention_combine.cuh"
#include "attention_split.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int64_t kMaxCapacity = int64_t{1} << 30;

int64_t num_splits(int64_t capacity) { return std::min<int64_t>(kMaxSplits, ceil_div(capacity, kSplitKeys)); }

int64_t statistics_bytes(int64_t num_rows, int64_t num_heads, int64_t splits) {
    return ceil_div(num_rows * num_heads * splits * kStatistics * 4, 16) * 16;
}

int32_t check(const krasis_cuda_attention_args &a) {
    const bool caches = a.rows || (a.k_cache && a.v_cache && a.position && a.num_rows == 1);
    const bool counts = a.num_rows >= 0 && a.num_heads > 0 && a.num_kv_heads > 0 && a.head_dim > 0 && a.capacity > 0;
    if (!a.q || !a.out || !a.workspace || !caches || !counts || !is_16_bit(a.dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.num_heads > kMaxBlocks / kMaxSplits || a.num_rows > kMaxBlocks / kMaxSplits / a.num_heads)
        return KRASIS_ERR_ARGUMENT;
    if (a.capacity > kMaxCapacity || a.window < 0) return KRASIS_ERR_ARGUMENT;
    if (a.ring < 0 || a.ring > kMaxCapacity || (a.ring > 0 && a.window == 0)) return KRASIS_ERR_ARGUMENT;
    if (a.ring > 0 && a.window > a.ring) return KRASIS_ERR_RANGE;
    if (a.kv_dtype != 0 && a.kv_dtype != KRASIS_I8) return KRASIS_ERR_ARGUMENT;
    if (a.head_dim % 16 || a.head_dim > kMaxHeadDim || a.num_heads % a.num_kv_heads) return KRASIS_ERR_SHAPE;
    const int64_t row = a.num_heads * a.head_dim;
    if (a.num_rows > 1 && (a.q_stride < row || a.out_stride < row)) return KRASIS_ERR_SHAPE;
    const bool aligned = is_aligned(a.q) && is_aligned(a.k_cache) && is_aligned(a.v_cache) && is_aligned(a.workspace);
    if (!aligned || a.q_stride % 8 || a.out_stride % 8 || a.keys_offset % 16 || a.values_offset % 16)
        return KRASIS_ERR_SHAPE;
    const int64_t needed = krasis_cuda_attention_workspace_bytes(a.num_rows, a.num_heads, a.head_dim, a.capacity);
    return a.workspace_bytes >= needed ? KRASIS_OK : KRASIS_ERR_RANGE;
}

AttentionParams params_of(const krasis_cuda_attention_args &a) {
    AttentionParams p{};
    p.q = static_cast<const uint8_t *>(a.q);
    p.keys = static_cast<const uint8_t *>(a.k_cache);
    p.values = static_cast<const uint8_t *>(a.v_cache);
    p.out = static_cast<uint8_t *>(a.out);
    p.position = a.position;
    p.rows = a.rows;
    p.sinks = a.sinks;
    p.keys_offset = a.keys_offset;
    p.values_offset = a.values_offset;
    p.q_stride = 2 * a.q_stride;
    p.out_stride = 2 * a.out_stride;
    p.scales_offset = a.kv_dtype == KRASIS_I8 ? a.num_kv_heads * (a.ring ? a.ring : a.capacity) * a.head_dim : 0;
    p.capacity = static_cast<int32_t>(a.capacity);
    p.num_heads = static_cast<int32_t>(a.num_heads);
    p.heads_per_kv = static_cast<int32_t>(a.num_heads / a.num_kv_heads);
    p.head_tiles = (p.heads_per_kv + kHeads - 1) / kHeads;
    p.head_dim = static_cast<int32_t>(a.head_dim);
    p.splits = static_cast<int32_t>(num_splits(a.capacity));
    p.window = static_cast<int32_t>(std::min(a.window, a.capacity));
    p.blocks_per_row = static_cast<int32_t>(a.num_kv_heads) * p.head_tiles * p.splits;
    p.scale = a.scale;
    p.ring = static_cast<int32_t>(a.ring);
    p.statistics = static_cast<float *>(a.workspace);
    const int64_t sums_at = statistics_bytes(a.num_rows, a.num_heads, p.splits);
    p.sums = reinterpret_cast<float *>(static_cast<uint8_t *>(a.workspace) + sums_at);
    return p;
}

template <class Type, int kDim, bool kCodes, bool kRing>
int32_t launch_dim(const AttentionParams &params, int64_t num_rows, void *stream) {
    using Tile = AttentionTile<Type, kDim, kCodes>;
    const simt::LaunchShape shape{static_cast<unsigned>(num_rows * params.blocks_per_row), Tile::kThreads,
                                  Tile::kSharedBytes};
    const int32_t status = launch_beside<attention_split_kernel<Type, kDim, kCodes, kRing>>(shape, params, stream);
    if (status != KRASIS_OK || params.splits == 1) return status;
    const simt::LaunchShape combine{static_cast<unsigned>(num_rows * params.num_heads), kCombineThreads,
                                    kCombineThreads * sizeof(float)};
    return launch_beside<attention_combine_kernel<Type, kDim>>(combine, params, stream);
}

template <class Type, bool kCodes, bool kRing>
int32_t launch_type(const AttentionParams &params, int64_t num_rows, void *stream) {
    if (params.head_dim <= 64) return launch_dim<Type, 64, kCodes, kRing>(params, num_rows, stream);
    if (params.head_dim <= 128) return launch_dim<Type, 128, kCodes, kRing>(params, num_rows, stream);
    if (params.head_dim <= 256) return launch_dim<Type, 256, kCodes, kRing>(params, num_rows, stream);
    return launch_dim<Type, 512, kCodes, kRing>(params, num_rows, stream);
}

template <class Type, bool kRing>
int32_t launch_cache(const krasis_cuda_attention_args &a, void *stream) {
    const AttentionParams params = params_of(a);
    return a.kv_dtype == KRASIS_I8 ? launch_type<Type, true, kRing>(params, a.num_rows, stream)
                                   : launch_type<Type, false, kRing>(params, a.num_rows, stream);
}

template <class Type>
int32_t launch_places(const krasis_cuda_attention_args &a, void *stream) {
    return a.ring ? launch_cache<Type, true>(a, stream) : launch_cache<Type, false>(a, stream);
}

}  // namespace
}  // namespace krasis::cuda

int64_t krasis_cuda_attention_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t head_dim, int64_t capacity) {
    using namespace krasis::cuda;
    if (num_rows <= 0 || num_heads <= 0 || head_dim <= 0 || capacity <= 0) return 0;
    const int64_t splits = num_splits(capacity);
    return statistics_bytes(num_rows, num_heads, splits) + num_rows * num_heads * splits * head_dim * 4;
}

int32_t krasis_cuda_attention_decode(const krasis_cuda_attention_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_attention_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK) return status;
    return a.dtype == KRASIS_BF16 ? launch_places<krasis::Bf16>(a, stream) : launch_places<krasis::F16>(a, stream);
}
