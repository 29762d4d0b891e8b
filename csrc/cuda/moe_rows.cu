// moe_rows.cu: the weighted sum of a token's slots.
#include <algorithm>

#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256;

// One block a token.
KRASIS_KERNEL(kThreads, 1)
moe_reduce_kernel(const krasis_cuda_moe_reduce_args p) {
    simt::follow();
    const int64_t token = simt::block_x();
    for (int64_t column = static_cast<int64_t>(simt::thread_x()) * kVector; column < p.n;
         column += kThreads * kVector) {
        float sum[kVector] = {};
        if (p.residual) load8(p.residual, token * p.n + column, p.out_dtype, sum);
        for (int64_t slot = token * p.top_k; slot < (token + 1) * p.top_k; ++slot) {
            const int id = p.ids[slot];
            if (id < 0 || id >= p.num_experts) continue;
            float values[kVector];
            load8(p.slots, slot * p.n + column, p.slots_dtype, values);
            const float weight = p.weights[slot];
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) sum[j] = simt::fused_multiply_add(weight, values[j], sum[j]);
        }
        store8(p.out, token * p.n + column, p.out_dtype, sum);
    }
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_moe_reduce(const krasis_cuda_moe_reduce_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_moe_reduce_args &a = *args;
    const bool counts = a.tokens >= 0 && a.tokens <= kMaxBlocks && a.top_k > 0 && a.n > 0 && a.num_experts > 0;
    if (!counts || !is_dtype(a.slots_dtype) || !is_dtype(a.out_dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.tokens > 0 && (!a.slots || !a.ids || !a.weights || !a.out)) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(a.slots) && is_aligned(a.out) && is_aligned(a.residual);
    if (a.n % kVector || !aligned) return KRASIS_ERR_SHAPE;
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(a.tokens), kThreads, 0};
    return launch_rows<moe_reduce_kernel>(a.tokens, shape, a, stream);
}
