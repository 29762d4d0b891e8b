// gated_delta_step.cuh: the gated delta rule token after token, for few rows, with the gated norm of its output.
//
// A block takes a head of one sequence, a warp 16 columns of its matrix: they stay in registers, four columns of every
// eighth row in each lane. Columns do not depend on each other; the norm alone sees all of a head's.
#pragma once

#include "gated_delta.cuh"

namespace krasis::cuda {

inline constexpr int kStepRows = kMaxDeltaDim / 8;  // of a lane

// A warp's tile of a matrix.
struct StepTile {
    float rows[kStepRows][4];

    KRASIS_DEVICE void load(const float *from, int key_dim, int lane, bool is_zero) {
        KRASIS_UNROLL
        for (int i = 0; i < kStepRows; ++i) {
            const int row = lane / 4 + 8 * i;
            simt::Words4 words{};
            if (row < key_dim && !is_zero) {
                words = *reinterpret_cast<const simt::Words4 *>(from + row * kDeltaTile + lane % 4 * 4);
            }
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) rows[i][j] = bits_float(words.w[j]);
        }
    }

    KRASIS_DEVICE void store(float *to, int key_dim, int lane) const {
        KRASIS_UNROLL
        for (int i = 0; i < kStepRows; ++i) {
            const int row = lane / 4 + 8 * i;
            if (row >= key_dim) continue;
            simt::Words4 words;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) words.w[j] = float_bits(rows[i][j]);
            *reinterpret_cast<simt::Words4 *>(to + row * kDeltaTile + lane % 4 * 4) = words;
        }
    }

    // from: the logarithms of how much stays of each row.
    KRASIS_DEVICE void decay(const float *from, int key_dim, int lane) {
        KRASIS_UNROLL
        for (int i = 0; i < kStepRows; ++i) {
            const int row = lane / 4 + 8 * i;
            const float kept = row < key_dim ? simt::exp_float(from[row]) : 0.0f;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) rows[i][j] *= kept;
        }
    }

    // One token; all lanes of a column get its sum. k, q: the lane's rows; v: its columns.
    KRASIS_DEVICE void step(const float (&k)[kStepRows], const float (&q)[kStepRows], const float (&v)[4], float decay,
                            float beta, float (&out)[4]) {
        float delta[4];
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) {
            float known = 0;
            KRASIS_UNROLL
            for (int i = 0; i < kStepRows; ++i) known = simt::fused_multiply_add(k[i], rows[i][j], known);
            delta[j] = beta * simt::fused_multiply_add(-decay, lane_sum(known, 4, 16), v[j]);
        }
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) {
            float sum = 0;
            KRASIS_UNROLL
            for (int i = 0; i < kStepRows; ++i) {
                rows[i][j] = simt::fused_multiply_add(k[i], delta[j], decay * rows[i][j]);
                sum = simt::fused_multiply_add(q[i], rows[i][j], sum);
            }
            out[j] = lane_sum(sum, 4, 16);
        }
    }
};

KRASIS_DEVICE void step_rows(const krasis_cuda_gated_delta_args &p, int64_t at, int lane, float (&values)[kStepRows]) {
    KRASIS_UNROLL
    for (int i = 0; i < kStepRows; ++i) {
        const int row = lane / 4 + 8 * i;
        values[i] = row < p.key_dim ? load1(p.mixed, at + row, p.dtype) : 0.0f;
    }
}

KRASIS_DEVICE void load_four(const void *from, int64_t index, int32_t dtype, float (&values)[4]) {
    float low[2], high[2];
    load_pair(from, index, dtype, low);
    load_pair(from, index + 2, dtype, high);
    values[0] = low[0];
    values[1] = low[1];
    values[2] = high[0];
    values[3] = high[1];
}

// shared: float [2][warps], the squares of a head's tiles, of every second token.
// kByChannel: with decays, and z apart.
template <bool kByChannel>
KRASIS_KERNEL(kDeltaThreads, 1)
delta_step_kernel(const krasis_cuda_gated_delta_args p) {
    constexpr int kWarps = kDeltaThreads / simt::kWarp;
    const int lane = static_cast<int>(simt::thread_x() % simt::kWarp);
    const int tile = static_cast<int>(simt::thread_x() / simt::kWarp);
    const int64_t sequence = simt::block_x() / p.value_heads, head = simt::block_x() % p.value_heads;
    const int64_t first = p.rows ? sequence : 0, count = p.rows ? 1 : p.tokens;
    const DeltaState state = delta_state(p, first);
    if (state.start < 0) return;  // the whole block
    const int tiles = static_cast<int>(p.value_dim / kDeltaTile), key_dim = static_cast<int>(p.key_dim);
    const bool works = tile < tiles;
    const int64_t keys = p.key_heads * p.key_dim, key_head = head / (p.value_heads / p.key_heads);
    const int column = tile * kDeltaTile + lane % 4 * 4;
    float *own = state.matrices + (head * tiles + tile) * key_dim * kDeltaTile;
    auto *squares = reinterpret_cast<float *>(simt::shared_memory());
    StepTile matrix{};
    if (works) matrix.load(own, key_dim, lane, state.start == 0);
    for (int64_t t = 0; t < count; ++t) {
        const int64_t row = first + t, mixed = row * delta_channels(p);
        const float *gates = p.gates + row * delta_gate_columns(p);
        float out[4] = {};
        if (works) {
            float k[kStepRows], q[kStepRows], v[4];
            step_rows(p, mixed + key_head * p.key_dim, lane, q);
            step_rows(p, mixed + keys + key_head * p.key_dim, lane, k);
            load_four(p.mixed, mixed + 2 * keys + head * p.value_dim + column, p.dtype, v);
            float kept = 1.0f;
            if constexpr (kByChannel) {
                matrix.decay(p.decays + (row * p.value_heads + head) * p.key_dim, key_dim, lane);
            } else {
                kept = simt::exp_float(gates[p.value_heads + head]);
            }
            matrix.step(k, q, v, kept, gates[head], out);
        }
        float square = 0;
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) square = simt::fused_multiply_add(out[j], out[j], square);
        square = lane_sum(square, 1, 2);
        float *sums = squares + t % 2 * kWarps;
        if (lane == 0) simt::shared_store(sums + tile, square);
        simt::sync_threads();
        float total = 0;
        KRASIS_UNROLL
        for (int w = 0; w < kWarps; ++w) total += simt::shared_load<float>(sums + w);
        if (!works || lane >= 4) continue;
        const float scale = simt::reciprocal_sqrt(total / static_cast<float>(p.value_dim) + p.eps);
        const int64_t at = head * p.value_dim + column;
        float z[4];
        if constexpr (kByChannel) {
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) z[j] = p.z[row * p.value_heads * p.value_dim + at + j];
        } else {
            load_four(p.x, row * delta_columns(p) + delta_channels(p) + at, p.dtype, z);
        }
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) {
            out[j] *= scale * load1(p.gate_norm, column + j, p.norm_dtype) * delta_gate(p, z[j]);
        }
        auto *to = static_cast<uint16_t *>(p.out) + row * p.value_heads * p.value_dim + at;
        *reinterpret_cast<simt::Words2 *>(to) = {
            {pack_pair(p.dtype, out[0], out[1]), pack_pair(p.dtype, out[2], out[3])}};
    }
    if (works) matrix.store(own, key_dim, lane);
}

}  // namespace krasis::cuda
