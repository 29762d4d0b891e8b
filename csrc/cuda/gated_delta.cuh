// gated_delta.cuh: what the kernels of the gated delta rule share: sizes, where rows lie, gates.
#pragma once

#include "krasis_cuda.h"
#include "vector8.cuh"

namespace krasis::cuda {

inline constexpr int kDeltaTile = 16;      // columns of a matrix that lie together
inline constexpr int kMaxDeltaDim = 128;   // channels of a head
inline constexpr int kMaxConvWidth = 8;    // tokens
inline constexpr int kDeltaThreads = 256;  // 8 warps: one for each tile of the widest head

KRASIS_BOTH int64_t delta_channels(const krasis_cuda_gated_delta_args &p) {
    return 2 * p.key_heads * p.key_dim + p.value_heads * p.value_dim;
}
// Elements from row to row of x: q, k, v and z, unless z is apart.
KRASIS_BOTH int64_t delta_columns(const krasis_cuda_gated_delta_args &p) {
    return delta_channels(p) + (p.z ? 0 : p.value_heads * p.value_dim);
}
// From row to row of gates: b of each head, and a unless each channel has its own.
KRASIS_BOTH int64_t delta_gate_columns(const krasis_cuda_gated_delta_args &p) {
    return (p.decays ? 1 : 2) * p.value_heads;
}

// A sequence's state of this layer, and how many of its tokens came before.
struct DeltaState {
    float *matrices, *columns;
    int64_t start;
};

// first_row: the first of its rows. With a table each row is a sequence of its own.
KRASIS_DEVICE DeltaState delta_state(const krasis_cuda_gated_delta_args &p, int64_t first_row) {
    if (!p.rows) return {p.matrices, p.columns, p.start};
    const krasis_cuda_row row = p.rows[first_row];
    auto *base = static_cast<uint8_t *>(row.keys);
    return {reinterpret_cast<float *>(base + p.matrices_offset), reinterpret_cast<float *>(base + p.columns_offset),
            row.position};
}

KRASIS_DEVICE float delta_sigmoid(float x) { return simt::divide(1.0f, 1.0f + simt::exp_float(-x)); }

KRASIS_DEVICE float delta_gate(const krasis_cuda_gated_delta_args &p, float z) {
    return p.gate == KRASIS_CUDA_GATE_SILU ? z * delta_sigmoid(z) : delta_sigmoid(z);
}

KRASIS_DEVICE void load_pair(const void *from, int64_t index, int32_t dtype, float (&pair)[2]) {
    const uint32_t word = *reinterpret_cast<const uint32_t *>(static_cast<const uint16_t *>(from) + index);
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const auto bits = static_cast<uint16_t>(word >> (16 * i));
        pair[i] = dtype == KRASIS_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
}

KRASIS_DEVICE uint32_t pack_pair(int32_t dtype, float low, float high) {
    return dtype == KRASIS_BF16 ? pack2<Bf16>(low, high) : pack2<F16>(low, high);
}

// The sum over lanes that differ in these bits of their number, in each of them.
KRASIS_DEVICE float lane_sum(float value, int from, int to) {
    for (int distance = from; distance <= to; distance *= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

}  // namespace krasis::cuda
