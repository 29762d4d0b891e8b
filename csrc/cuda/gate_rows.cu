// gate_rows.cu: a gate for each channel of attention's output.
#include <algorithm>

#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // each thread goes on from there

// Eight channels a thread.
KRASIS_KERNEL(kThreads, 1)
gate_rows_kernel(const krasis_cuda_gate_rows_args p) {
    simt::follow();
    const int64_t count = p.count / kVector, step = static_cast<int64_t>(simt::num_blocks()) * kThreads;
    for (int64_t cell = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x(); cell < count;
         cell += step) {
        float values[kVector], gates[kVector];
        load8(p.x, cell * kVector, p.dtype, values);
        load8(p.gates, cell * kVector, p.dtype, gates);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] = simt::divide(values[j], 1.0f + simt::exp_float(-gates[j]));
        store8(p.x, cell * kVector, p.dtype, values);
    }
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_gate_rows(const krasis_cuda_gate_rows_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_gate_rows_args &a = *args;
    if (!a.x || !a.gates || a.count < 0 || !is_dtype(a.dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.count % kVector || !is_aligned(a.x) || !is_aligned(a.gates)) return KRASIS_ERR_SHAPE;
    const auto blocks = static_cast<unsigned>(std::min(ceil_div(a.count / kVector, kThreads), kMostBlocks));
    return launch_rows<gate_rows_kernel>(blocks, {blocks, kThreads, 0}, a, stream);
}
