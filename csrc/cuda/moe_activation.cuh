// moe_activation.cuh: what stands between the two products of an expert, where it is not silu(gate) * up: one formula
// without branches, so that it costs the kernels little room. Experts without gate have relu(up)^2 alone.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

// min(g sigmoid(g (linear + cubic g^2)), most_gated) (clip(u) + offset), g cut to most_gate before, u to +-most_up.
struct MoeActivation {
    float most_gate, linear, cubic, most_gated, most_up, offset;
};

KRASIS_DEVICE float moe_activate(const MoeActivation &a, float gate, float up) {
    const float g = gate > a.most_gate ? a.most_gate : gate;
    const float gated = g * simt::reciprocal(1.0f + simt::exp_float(-g * (a.linear + a.cubic * g * g)));
    const float cut = up > a.most_up ? a.most_up : up < -a.most_up ? -a.most_up : up;
    return (gated > a.most_gated ? a.most_gated : gated) * (cut + a.offset);
}

KRASIS_DEVICE float moe_relu_squared(float up) { return up > 0 ? up * up : 0; }

// False: experts have no such activation. Without a gate silu stands for none.
inline bool moe_activation(const krasis_cuda_moe_gemm_args &a, MoeActivation &out) {
    const float none = __builtin_inff();
    constexpr float kTwice = 2 * 0.7978845608f;  // 1 + tanh(y) is 2 sigmoid(2y); sqrt(2 / pi)
    switch (a.activation) {
        case KRASIS_CUDA_SILU:
            out = {none, 1, 0, none, none, 0};
            return true;
        case KRASIS_CUDA_GELU_TANH:
            out = {none, kTwice, kTwice * 0.044715f, none, none, 0};
            return true;
        case KRASIS_CUDA_SWIGLU_OFFSET:
            out = {a.limit, a.alpha, 0, none, a.limit, 1};
            return true;
        case KRASIS_CUDA_SILU_CLAMPED_BEFORE:
            out = {a.limit, 1, 0, none, a.limit, 0};
            return true;
        case KRASIS_CUDA_SILU_CLAMPED_AFTER:
            out = {none, 1, 0, a.limit, a.limit, 0};
            return true;
        case KRASIS_CUDA_RELU_SQUARED:
            return !a.gated;
        default:
            return false;
    }
}

}  // namespace krasis::cuda
