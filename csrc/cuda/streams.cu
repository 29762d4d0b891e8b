// streams.cu: gated residual streams: what stands around a block, and what it reads.
#include <algorithm>

#include "row_norm.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // each thread goes on from there

KRASIS_DEVICE float sigmoid(float x) { return simt::divide(1.0f, 1.0f + simt::exp_float(-x)); }

KRASIS_DEVICE int64_t first_cell() { return static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x(); }

KRASIS_DEVICE int64_t cell_step() { return static_cast<int64_t>(simt::num_blocks()) * kThreads; }

// One block a stream of a row. shared: float [kNormWarps].
KRASIS_KERNEL(kNormThreads, 1)
stream_norm_kernel(const krasis_cuda_stream_norm_args p) {
    simt::follow();
    const int64_t row = simt::block_x() * p.k, own = simt::block_x() % p.streams * p.k;
    auto *sums = reinterpret_cast<float *>(simt::shared_memory());
    const float scale = row_scale(p.x, row, p.k, KRASIS_F32, p.eps, sums);
    for (int64_t i = simt::thread_x() * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector], weights[kVector];
        load8(p.x, row + i, KRASIS_F32, values);
        load8(p.weight, own + i, p.weight_dtype, weights);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] = values[j] * scale * weights[j];
        store8(p.out, row + i, KRASIS_F32, values);
    }
}

KRASIS_KERNEL(kThreads, 1)
stream_squash_kernel(const krasis_cuda_stream_squash_args p) {
    simt::follow();
    for (int64_t cell = first_cell(); cell < p.count / kVector; cell += cell_step()) {
        float values[kVector];
        load8(p.x, cell * kVector, KRASIS_F32, values);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) {
            const float scaled = values[j] * p.scale;
            values[j] = scaled * sigmoid(scaled);
        }
        store8(p.x, cell * kVector, KRASIS_F32, values);
    }
}

// Eight channels of a row a thread, in all its streams.
KRASIS_KERNEL(kThreads, 1)
stream_mix_kernel(const krasis_cuda_stream_mix_args p) {
    simt::follow();
    const int64_t columns = p.k / kVector;
    const float share = simt::divide(1.0f, static_cast<float>(p.streams));
    for (int64_t cell = first_cell(); cell < p.tokens * columns; cell += cell_step()) {
        const int64_t row = cell / columns, column = cell % columns * kVector;
        float sum[kVector] = {};
        for (int64_t s = 0; s < p.streams; ++s) {
            const int64_t at = (row * p.streams + s) * p.k + column;
            float gates[kVector], values[kVector];
            load8(p.gates, at, KRASIS_F32, gates);
            load8(p.normed, at, KRASIS_F32, values);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) sum[j] = simt::fused_multiply_add(sigmoid(gates[j]), values[j], sum[j]);
        }
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) sum[j] *= share;
        store8(p.out, row * p.k + column, KRASIS_F32, sum);
        store8(p.x, row * p.k + column, p.x_dtype, sum);
        const float zeros[kVector] = {};
        if (p.cleared) store8(p.cleared, row * p.k + column, KRASIS_F32, zeros);
    }
}

// Eight channels of a stream a thread.
KRASIS_KERNEL(kThreads, 1)
stream_add_kernel(const krasis_cuda_stream_add_args p) {
    simt::follow();
    const int64_t columns = p.k / kVector;
    for (int64_t cell = first_cell(); cell < p.tokens * p.streams * columns; cell += cell_step()) {
        const int64_t row = cell / columns, column = cell % columns * kVector;
        const float logit = simt::divide(p.logits[row], static_cast<float>(p.streams)), share = 2.0f * sigmoid(logit);
        float values[kVector], added[kVector];
        load8(p.x, row * p.k + column, KRASIS_F32, values);
        load8(p.added, row / p.streams * p.k + column, KRASIS_F32, added);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] = simt::fused_multiply_add(share, added[j], values[j]);
        store8(p.x, row * p.k + column, KRASIS_F32, values);
    }
}

bool are_sizes(int64_t tokens, int64_t streams, int64_t k) {
    return tokens >= 0 && streams > 0 && streams <= 64 && k > 0 && tokens <= kMaxBlocks / streams;
}

unsigned blocks_for(int64_t cells) {
    return static_cast<unsigned>(std::min(ceil_div(cells / kVector, kThreads), kMostBlocks));
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_stream_norm(const krasis_cuda_stream_norm_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_stream_norm_args &a = *args;
    const bool present = a.x && a.weight && a.out && is_dtype(a.weight_dtype);
    if (!present || !are_sizes(a.tokens, a.streams, a.k)) return KRASIS_ERR_ARGUMENT;
    if (a.k % kVector || !is_aligned(a.x) || !is_aligned(a.weight) || !is_aligned(a.out)) return KRASIS_ERR_SHAPE;
    const auto blocks = static_cast<unsigned>(a.tokens * a.streams);
    return launch_rows<stream_norm_kernel>(a.tokens, {blocks, kNormThreads, kNormWarps * sizeof(float)}, a, stream);
}

int32_t krasis_cuda_stream_squash(const krasis_cuda_stream_squash_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_stream_squash_args &a = *args;
    if (!a.x || a.count < 0) return KRASIS_ERR_ARGUMENT;
    if (a.count % kVector || !is_aligned(a.x)) return KRASIS_ERR_SHAPE;
    const unsigned blocks = blocks_for(a.count);
    return launch_rows<stream_squash_kernel>(blocks, {blocks, kThreads, 0}, a, stream);
}

int32_t krasis_cuda_stream_mix(const krasis_cuda_stream_mix_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_stream_mix_args &a = *args;
    const bool present = a.normed && a.gates && a.out && a.x && is_dtype(a.x_dtype);
    if (!present || !are_sizes(a.tokens, a.streams, a.k)) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(a.normed) && is_aligned(a.gates) && is_aligned(a.out) && is_aligned(a.x);
    if (a.k % kVector || !aligned || !is_aligned(a.cleared)) return KRASIS_ERR_SHAPE;
    return launch_rows<stream_mix_kernel>(a.tokens, {blocks_for(a.tokens * a.k), kThreads, 0}, a, stream);
}

int32_t krasis_cuda_stream_add(const krasis_cuda_stream_add_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_stream_add_args &a = *args;
    if (!a.x || !a.added || !a.logits || !are_sizes(a.tokens, a.streams, a.k)) return KRASIS_ERR_ARGUMENT;
    if (a.k % kVector || !is_aligned(a.x) || !is_aligned(a.added)) return KRASIS_ERR_SHAPE;
    const unsigned blocks = blocks_for(a.tokens * a.streams * a.k);
    return launch_rows<stream_add_kernel>(a.tokens, {blocks, kThreads, 0}, a, stream);
}
