// gated_delta.cu: checks and launches of the gated delta rule.
#include <algorithm>

#include "gated_delta_mix.cuh"
#include "gated_delta_scan.cuh"
#include "gated_delta_step.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kFewestChunked = 16;  // rows from which on chunks are faster, launches included
constexpr int kDeltaWarps = kDeltaThreads / simt::kWarp;

int32_t check_delta(const krasis_cuda_gated_delta_args &a) {
    const bool counts = a.tokens >= 0 && a.key_heads > 0 && a.value_heads > 0 && a.key_dim > 0 && a.value_dim > 0 &&
                        a.conv_width > 0 && a.start >= 0;
    const bool kinds = is_16_bit(a.dtype) && is_dtype(a.norm_dtype) &&
                       (a.gate == KRASIS_CUDA_GATE_SILU || a.gate == KRASIS_CUDA_GATE_SIGMOID);
    const bool arrays = a.x && a.gates && a.mixed && a.out && a.conv && a.a_log && a.dt_bias && a.gate_norm;
    if (!a.decays != !a.z) return KRASIS_ERR_ARGUMENT;
    if (!counts || !kinds || !arrays || !(a.rows || (a.matrices && a.columns))) return KRASIS_ERR_ARGUMENT;
    const bool heads = a.key_heads <= kMostHeads && a.value_heads <= kMostHeads && a.value_heads % a.key_heads == 0;
    const bool dims = a.key_dim % kDeltaTile == 0 && a.value_dim % kDeltaTile == 0 && a.key_dim <= kMaxDeltaDim &&
                      a.value_dim <= kMaxDeltaDim && a.conv_width <= kMaxConvWidth;
    const bool aligned = is_aligned(a.x) && is_aligned(a.mixed) && is_aligned(a.out) && is_aligned(a.matrices) &&
                         is_aligned(a.columns) && is_aligned(a.chunks) && a.matrices_offset % 16 == 0 &&
                         a.columns_offset % 16 == 0;
    if (!heads || !dims || !aligned) return KRASIS_ERR_SHAPE;
    const int64_t tasks = mix_units(a) * a.tokens;
    return tasks > kMaxBlocks || (a.chunks && a.num_chunks <= 0) ? KRASIS_ERR_ARGUMENT : KRASIS_OK;
}

// So many chunks at a time as the workspace has room for.
template <class Type>
int32_t launch_chunks(const krasis_cuda_gated_delta_args &a, void *stream) {
    const int64_t chunks = ceil_div(a.tokens, kChunk), tiles = ceil_div(a.value_dim, kScanColumns);
    int32_t status = KRASIS_OK;
    for (int64_t begin = 0; begin < chunks && status == KRASIS_OK; begin += a.num_chunks) {
        const DeltaSegment segment{a, begin * kChunk, std::min(a.num_chunks, chunks - begin)};
        const auto alone = static_cast<unsigned>(segment.chunks * a.value_heads);
        status =
            launch<delta_chunk_kernel<Type>>({alone, kChunkThreads, 2 * kWideBytes + kDecayBytes}, segment, stream);
        if (status != KRASIS_OK) break;
        const auto blocks = static_cast<unsigned>(a.value_heads * tiles);
        status = launch<delta_scan_kernel<Type>>({blocks, kDeltaThreads, kScanShared}, segment, stream);
    }
    if (status != KRASIS_OK) return status;
    const auto norms = static_cast<unsigned>(ceil_div(a.tokens * a.value_heads, kDeltaWarps));
    return launch<delta_norm_kernel>({norms, kDeltaThreads, 0}, a, stream);
}

int32_t launch_steps(const krasis_cuda_gated_delta_args &a, void *stream) {
    const auto steps = static_cast<unsigned>(a.value_heads * (a.rows ? a.tokens : 1));
    const simt::LaunchShape shape{steps, kDeltaThreads, 2 * kDeltaWarps * sizeof(float)};
    if (a.decays) return launch<delta_step_kernel<true>>(shape, a, stream);
    return launch<delta_step_kernel<false>>(shape, a, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_gated_delta(const krasis_cuda_gated_delta_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_gated_delta_args &a = *args;
    int32_t status = check_delta(a);
    if (status != KRASIS_OK || a.tokens == 0) return status;
    const auto mixes = static_cast<unsigned>(ceil_div(mix_units(a) * mix_runs(a), kDeltaWarps));
    status = launch<delta_mix_kernel>({mixes, kDeltaThreads, 0}, a, stream);
    if (status != KRASIS_OK) return status;
    if (a.chunks && !a.rows && !a.decays && a.tokens >= kFewestChunked) {
        return a.dtype == KRASIS_BF16 ? launch_chunks<krasis::Bf16>(a, stream) : launch_chunks<krasis::F16>(a, stream);
    }
    return launch_steps(a, stream);
}
