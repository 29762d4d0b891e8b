// int8_rows.cu: checks, choice of tile and launch of the dense products.
#include <algorithm>

#include "int8_rows.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int64_t kVectorTokens = 2;  // above, tensor cores win: measured on an H100

int32_t check(const krasis_cuda_int8_gemm_args &a) {
    const bool pointers = a.x && a.weight && a.scales && a.out;
    const bool kinds = is_16_bit(a.dtype) && (a.out_dtype == a.dtype || a.out_dtype == KRASIS_F32);
    if (!pointers || !kinds || a.tokens < 0 || a.k <= 0 || a.n <= 0 || a.k > INT32_MAX || a.n > INT32_MAX) {
        return KRASIS_ERR_ARGUMENT;
    }
    const bool sizes = a.k % 64 == 0 && a.n % 32 == 0;
    const bool strides = a.x_stride >= a.k && a.x_stride % 8 == 0 && a.out_stride >= a.n && a.out_stride % 8 == 0;
    const bool aligned = is_aligned(a.x) && is_aligned(a.weight) && is_aligned(a.out) && is_aligned(a.residual);
    return sizes && strides && aligned ? KRASIS_OK : KRASIS_ERR_SHAPE;
}

// What a launch fetches before its turn must not drive out what those ahead of it use.
constexpr int64_t kMostPrefetchBytes = 16 << 20;

// A launch that reads much more than it may fetch early takes more from those ahead of it than it gains (an H200, q, k
// and v of Qwen3-235B, 38 MB: 15.4 us in turn, 23.9 us beside the launch ahead).
bool begins_early(const Int8Params &params) { return int64_t{params.strips} * params.k * 32 <= kMostPrefetchBytes; }

int32_t prefetch_bytes(const Int8Params &params) {
    constexpr int64_t kUnit = 4096;
    const int64_t each = kMostPrefetchBytes / params.strips / kUnit * kUnit, strip = int64_t{params.k} * 32;
    return begins_early(params) ? static_cast<int32_t>(std::min(each, strip)) : 0;
}

template <auto kKernel, class Params>
int32_t launch_weights(const simt::LaunchShape &shape, const Params &params, void *stream) {
    return begins_early(params) ? launch_beside<kKernel>(shape, params, stream)
                                : launch<kKernel>(shape, params, stream);
}

template <class Type, int kTokens, int kWarps>
int32_t launch_warps(const Int8Params &params, void *stream) {
    const simt::LaunchShape shape{static_cast<unsigned>(params.strips), 32 * kWarps,
                                  kWarps * kTokens * 32 * sizeof(float)};
    return launch_weights<int8_gemv_kernel<Type, kTokens, kWarps>>(shape, params, stream);
}

// A narrow weight has too few strips to keep the memory busy with eight warps each.
constexpr int32_t kFewStrips = 256;

template <class Type, int kTokens>
int32_t launch_vector(Int8Params params, void *stream) {
    params.prefetch_bytes = prefetch_bytes(params);
    return params.strips < kFewStrips ? launch_warps<Type, kTokens, 16>(params, stream)
                                      : launch_warps<Type, kTokens, 8>(params, stream);
}

template <class Type, int kWarpsM, int kTilesM, int kStrips, int kStages>
int32_t launch_matrix(Int8Params params, void *stream) {
    using Tile = Int8Tile<Type, kWarpsM, kTilesM, kStrips, kStages>;
    params.column_blocks = static_cast<int32_t>(ceil_div(params.strips, Tile::kBlockStrips));
    const int64_t blocks = ceil_div(params.tokens, Tile::kRows) * params.column_blocks;
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const simt::LaunchShape shape{static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes};
    return launch_rows<int8_gemm_kernel<Type, kWarpsM, kTilesM, kStrips, kStages>>(params.tokens, shape, params,
                                                                                   stream);
}

template <class Type, int kWarps>
int32_t launch_norm(const NormInt8Params &params, void *stream) {
    const size_t floats = 32 * kWarps + kNormWarps;
    const simt::LaunchShape shape{static_cast<unsigned>(params.strips), 32 * kWarps,
                                  2 * static_cast<size_t>(params.k) + floats * sizeof(float)};
    return launch_weights<norm_int8_gemv_kernel<Type, kWarps>>(shape, params, stream);
}

// As many warps as launch_vector has: the same bits.
template <class Type>
int32_t launch_norm(NormInt8Params params, void *stream) {
    params.prefetch_bytes = prefetch_bytes(params);
    return params.strips < kFewStrips ? launch_norm<Type, 16>(params, stream) : launch_norm<Type, 8>(params, stream);
}

// Shared memory: at most 96 KiB, so that every target can run every tile.
template <class Type>
int32_t launch_type(const Int8Params &params, void *stream) {
    if (params.tokens == 1) return launch_vector<Type, 1>(params, stream);
    if (params.tokens <= kVectorTokens) return launch_vector<Type, kVectorTokens>(params, stream);
    if (params.tokens <= 16) return launch_matrix<Type, 1, 1, 1, 4>(params, stream);
    if (params.tokens <= 64) return launch_matrix<Type, 1, 4, 1, 4>(params, stream);
    return launch_matrix<Type, 2, 4, 1, 4>(params, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_int8_gemm(const krasis_cuda_int8_gemm_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_int8_gemm_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK || a.tokens == 0) return status;
    Int8Params p{};
    p.x = static_cast<const uint8_t *>(a.x);
    p.weight = reinterpret_cast<const uint8_t *>(a.weight);
    p.scales = a.scales;
    p.residual = static_cast<const uint8_t *>(a.residual);
    p.out = static_cast<uint8_t *>(a.out);
    p.x_stride_bytes = a.x_stride * 2;
    p.out_stride = a.out_stride;
    p.tokens = a.tokens;
    p.k = static_cast<int32_t>(a.k);
    p.strips = static_cast<int32_t>(a.n / 32);
    p.out_is_float = a.out_dtype == KRASIS_F32;
    return a.dtype == KRASIS_BF16 ? launch_type<krasis::Bf16>(p, stream) : launch_type<krasis::F16>(p, stream);
}

int32_t krasis_cuda_norm_int8_gemv(const krasis_cuda_norm_int8_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_norm_int8_args &a = *args;
    const bool pointers = a.hidden && a.norm && a.weight && a.scales && a.out;
    const bool kinds =
        is_16_bit(a.dtype) && is_dtype(a.norm_dtype) && (a.out_dtype == a.dtype || a.out_dtype == KRASIS_F32);
    if (!pointers || !kinds || a.k <= 0 || a.n <= 0 || a.n > INT32_MAX) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(a.hidden) && is_aligned(a.norm) && is_aligned(a.weight) && is_aligned(a.out);
    if (a.k % 64 || a.n % 32 || a.k > KRASIS_CUDA_MAX_NORMED || !aligned) return KRASIS_ERR_SHAPE;
    NormInt8Params p{};
    p.weight = reinterpret_cast<const uint8_t *>(a.weight);
    p.scales = a.scales;
    p.out = static_cast<uint8_t *>(a.out);
    p.out_stride = a.n;
    p.tokens = 1;
    p.k = static_cast<int32_t>(a.k);
    p.strips = static_cast<int32_t>(a.n / 32);
    p.out_is_float = a.out_dtype == KRASIS_F32;
    p.hidden = a.hidden;
    p.norm = a.norm;
    p.norm_dtype = a.norm_dtype;
    p.eps = a.eps;
    return a.dtype == KRASIS_BF16 ? launch_norm<krasis::Bf16>(p, stream) : launch_norm<krasis::F16>(p, stream);
}
