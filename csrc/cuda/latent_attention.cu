// latent_attention.cu: checks, choice of tile and launch of attention over latents.
#include "latent_combine.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int64_t kMaxCapacity = int64_t{1} << 30, kMaxRank = 512, kSmallRank = 256;

int64_t statistics_bytes(int64_t num_rows, int64_t num_heads, int64_t splits) {
    return ceil_div(num_rows * num_heads * splits * kLatentStatistics * 4, 16) * 16;
}

int32_t check(const krasis_cuda_latent_attention_args &a) {
    const bool counts = a.num_rows >= 0 && a.num_heads > 0 && a.kv_rank > 0 && a.rope_dim >= 0 && a.capacity > 0;
    const bool pointers = a.q_latent && a.q_rope && a.out && (a.rows || a.cache) && (a.workspace || a.splits == 1);
    if (!pointers || !counts || a.start < 0 || !is_16_bit(a.dtype) || a.capacity > kMaxCapacity)
        return KRASIS_ERR_ARGUMENT;
    if (a.chosen && (a.budget <= 0 || a.budget > kMaxCapacity)) return KRASIS_ERR_ARGUMENT;
    if (a.splits < 1 || a.splits > kLatentMaxSplits) return KRASIS_ERR_ARGUMENT;
    if (a.num_heads > kMaxBlocks / a.splits || a.num_rows > kMaxBlocks / a.splits / a.num_heads)
        return KRASIS_ERR_ARGUMENT;
    if (a.kv_rank % 32 || a.kv_rank > kMaxRank || a.rope_dim % 16 || a.rope_dim > kLatentRope) return KRASIS_ERR_SHAPE;
    const bool aligned = is_aligned(a.q_latent) && is_aligned(a.cache) && is_aligned(a.out) && is_aligned(a.workspace);
    if (!aligned || a.q_stride % 2 || a.q_head_stride % 2 || a.keys_offset % 16) return KRASIS_ERR_SHAPE;
    const bool inside = a.rows || a.start + a.num_rows <= a.capacity;
    const int64_t needed = krasis_cuda_latent_workspace_bytes(a.num_rows, a.num_heads, a.kv_rank, a.splits);
    return inside && (a.splits == 1 || a.workspace_bytes >= needed) ? KRASIS_OK : KRASIS_ERR_RANGE;
}

LatentParams params_of(const krasis_cuda_latent_attention_args &a) {
    LatentParams p{};
    p.q_latent = static_cast<const uint8_t *>(a.q_latent);
    p.q_rope = static_cast<const uint8_t *>(a.q_rope);
    p.out = static_cast<uint8_t *>(a.out);
    p.cache = static_cast<const uint8_t *>(a.cache);
    p.rows = a.rows;
    p.chosen = a.chosen;
    p.budget = a.chosen ? static_cast<int32_t>(a.budget) : 0;
    p.by_row = a.rows || a.chosen;
    p.start = a.start;
    p.keys_offset = a.keys_offset;
    p.rope_stride = 2 * a.q_stride;
    p.rope_head = 2 * a.q_head_stride;
    p.num_queries = a.num_rows * a.num_heads;
    p.capacity = static_cast<int32_t>(a.capacity);
    p.num_heads = static_cast<int32_t>(a.num_heads);
    p.kv_rank = static_cast<int32_t>(a.kv_rank);
    p.rope_dim = static_cast<int32_t>(a.rope_dim);
    p.splits = static_cast<int32_t>(a.splits);
    p.scale = a.scale;
    if (a.splits > 1) {
        p.statistics = static_cast<float *>(a.workspace);
        const int64_t sums_at = statistics_bytes(a.num_rows, a.num_heads, a.splits);
        p.sums = reinterpret_cast<float *>(static_cast<uint8_t *>(a.workspace) + sums_at);
    }
    return p;
}

template <class Type, int kRank, int kRowTiles, bool kChosen>
int32_t launch_tile(LatentParams params, int64_t num_rows, void *stream) {
    using Tile = LatentTile<Type, kRank, kRowTiles>;
    params.tile_queries = Tile::kHeads;
    params.tiles_per_row = (params.num_heads + Tile::kHeads - 1) / Tile::kHeads;
    const int64_t tiles = params.by_row ? num_rows * params.tiles_per_row : ceil_div(params.num_queries, Tile::kHeads);
    const simt::LaunchShape shape{static_cast<unsigned>(tiles * params.splits), Tile::kThreads, Tile::kSharedBytes};
    const int32_t status = launch<latent_attention_kernel<Type, kRank, kRowTiles, kChosen>>(shape, params, stream);
    if (status != KRASIS_OK || params.splits == 1) return status;
    const simt::LaunchShape combine{static_cast<unsigned>(num_rows * params.num_heads), kLatentCombineThreads,
                                    kLatentMaxSplits * sizeof(float)};
    return launch<latent_combine_kernel<Type>>(combine, params, stream);
}

template <class Type, bool kChosen>
int32_t launch_rank(const LatentParams &params, int64_t num_rows, void *stream) {
    const bool few = (params.by_row ? params.num_heads : params.num_queries) <= 16;
    if (params.kv_rank <= kSmallRank) {
        return few ? launch_tile<Type, kSmallRank, 1, kChosen>(params, num_rows, stream)
                   : launch_tile<Type, kSmallRank, 2, kChosen>(params, num_rows, stream);
    }
    return few ? launch_tile<Type, kMaxRank, 1, kChosen>(params, num_rows, stream)
               : launch_tile<Type, kMaxRank, 2, kChosen>(params, num_rows, stream);
}

template <class Type>
int32_t launch_type(const LatentParams &params, int64_t num_rows, void *stream) {
    return params.chosen ? launch_rank<Type, true>(params, num_rows, stream)
                         : launch_rank<Type, false>(params, num_rows, stream);
}

}  // namespace
}  // namespace krasis::cuda

int64_t krasis_cuda_latent_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t kv_rank, int64_t splits) {
    using namespace krasis::cuda;
    if (num_rows <= 0 || num_heads <= 0 || kv_rank <= 0 || splits <= 1) return 0;
    return statistics_bytes(num_rows, num_heads, splits) + num_rows * num_heads * splits * kv_rank * 4;
}

int32_t krasis_cuda_latent_attention(const krasis_cuda_latent_attention_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_latent_attention_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK) return status;
    return a.dtype == KRASIS_BF16 ? launch_type<krasis::Bf16>(params_of(a), a.num_rows, stream)
                                  : launch_type<krasis::F16>(params_of(a), a.num_rows, stream);
}
