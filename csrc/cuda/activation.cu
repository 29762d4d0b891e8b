// activation.cu: what stands between the two products of dense and shared MLPs, and what is added to the residual.
#include <algorithm>

#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // each thread goes on from there

KRASIS_DEVICE float sigmoid(float x) { return simt::divide(1.0f, 1.0f + simt::exp_float(-x)); }

KRASIS_DEVICE float clip(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// 1 + tanh(y) is 2 sigmoid(2y).
KRASIS_DEVICE float gelu_tanh(float x) {
    constexpr float kFactor = 0.7978845608f;  // sqrt(2 / pi)
    return x * sigmoid(2 * kFactor * (x + 0.044715f * x * x * x));
}

KRASIS_DEVICE float activate(const krasis_cuda_activation_args &p, float g, float u) {
    const float low = g > p.limit ? p.limit : g;
    switch (p.kind) {
        case KRASIS_CUDA_GELU_TANH:
            return gelu_tanh(g) * u;
        case KRASIS_CUDA_SWIGLU_OFFSET:
            return low * sigmoid(p.alpha * low) * (clip(u, p.limit) + 1);
        case KRASIS_CUDA_SILU_CLAMPED_BEFORE:
            return low * sigmoid(low) * clip(u, p.limit);
        case KRASIS_CUDA_SILU_CLAMPED_AFTER: {
            const float silu = g * sigmoid(g);
            return (silu > p.limit ? p.limit : silu) * clip(u, p.limit);
        }
        case KRASIS_CUDA_RELU_SQUARED:
            return u > 0 ? u * u : 0;
        default:
            return g * sigmoid(g) * u;
    }
}

// Eight columns a thread.
KRASIS_KERNEL(kThreads, 1)
gated_activation_kernel(const krasis_cuda_activation_args p) {
    simt::follow();
    const bool gated = p.kind != KRASIS_CUDA_RELU_SQUARED;
    const int64_t columns = p.n / kVector, count = p.tokens * columns;
    const int64_t step = static_cast<int64_t>(simt::num_blocks()) * kThreads;
    for (int64_t cell = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x(); cell < count;
         cell += step) {
        const int64_t row = cell / columns, column = cell % columns * kVector, up = gated ? p.n + column : column;
        float g[kVector] = {}, u[kVector], b[kVector];
        load8(p.x, row * p.x_stride + up, p.dtype, u);
        if (gated) load8(p.x, row * p.x_stride + column, p.dtype, g);
        if (p.bias) {
            load8(p.bias, up, KRASIS_F32, b);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) u[j] += b[j];
        }
        if (p.bias && gated) {
            load8(p.bias, column, KRASIS_F32, b);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) g[j] += b[j];
        }
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) u[j] = activate(p, g[j], u[j]);
        store8(p.out, row * p.out_stride + column, p.dtype, u);
    }
}

KRASIS_KERNEL(kThreads, 1)
add_rows_kernel(const krasis_cuda_add_rows_args p) {
    simt::follow();
    const int64_t columns = p.n / kVector, count = p.tokens * columns;
    const int64_t step = static_cast<int64_t>(simt::num_blocks()) * kThreads;
    for (int64_t cell = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x(); cell < count;
         cell += step) {
        const int64_t row = cell / columns, column = cell % columns * kVector, at = row * p.n + column;
        float sum[kVector], values[kVector] = {}, b[kVector] = {};
        load8(p.hidden, at, KRASIS_F32, sum);
        if (p.x) load8(p.x, at, p.x_dtype, values);
        if (p.bias) load8(p.bias, column, KRASIS_F32, b);
        const float factor = p.gates ? sigmoid(p.gates[row]) : 1.0f;
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) sum[j] = simt::fused_multiply_add(factor, values[j] + b[j], sum[j]);
        store8(p.hidden, at, KRASIS_F32, sum);
    }
}

unsigned blocks_for(int64_t tokens, int64_t n) {
    return static_cast<unsigned>(std::min(ceil_div(tokens * (n / kVector), kThreads), kMostBlocks));
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_gated_activation(const krasis_cuda_activation_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_activation_args &a = *args;
    const bool kinds = a.kind >= KRASIS_CUDA_SILU && a.kind <= KRASIS_CUDA_RELU_SQUARED && is_dtype(a.dtype);
    if (!kinds || !a.x || !a.out || a.tokens < 0 || a.tokens > kMaxBlocks || a.n <= 0) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(a.x) && is_aligned(a.out) && is_aligned(a.bias);
    const int64_t columns = a.kind == KRASIS_CUDA_RELU_SQUARED ? a.n : 2 * a.n;
    const bool strides = a.x_stride % kVector == 0 && a.out_stride % kVector == 0;
    if (!aligned || !strides || a.n % kVector || a.x_stride < columns || a.out_stride < a.n) return KRASIS_ERR_SHAPE;
    return launch_rows<gated_activation_kernel>(a.tokens, {blocks_for(a.tokens, a.n), kThreads, 0}, a, stream);
}

int32_t krasis_cuda_add_rows(const krasis_cuda_add_rows_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_add_rows_args &a = *args;
    if (!a.hidden || a.tokens < 0 || a.tokens > kMaxBlocks || a.n <= 0 || !is_dtype(a.x_dtype))
        return KRASIS_ERR_ARGUMENT;
    if (a.n % kVector || !is_aligned(a.hidden) || !is_aligned(a.x) || !is_aligned(a.bias)) return KRASIS_ERR_SHAPE;
    return launch_rows<add_rows_kernel>(a.tokens, {blocks_for(a.tokens, a.n), kThreads, 0}, a, stream);
}
