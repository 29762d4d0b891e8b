// gated_delta_mix.cuh: what comes before the gated delta rule: the short convolution with silu, q and k to length 1,
// and the two gates.
//
// A warp takes a head of q, k or v over a run of tokens, or the gates of these. The past of the first tokens of a
// sequence is in its columns; the warp of the first run alone reads them, and so it may overwrite them.
#pragma once

#include "gated_delta.cuh"

namespace krasis::cuda {

inline constexpr int kMixRun = 8;              // tokens of a warp: as many as a convolution looks back, or more
inline constexpr float kLeastDecay = -100.0f;  // leaves nothing of fp32; sums of 64 are finite, and exact enough
inline constexpr int kMixPairs = kMaxDeltaDim / 64;
static_assert(kMixRun >= kMaxConvWidth - 1);

// Heads of q, k and v, the gates, and heads of decays by channel.
KRASIS_BOTH int64_t mix_units(const krasis_cuda_gated_delta_args &p) {
    return 2 * p.key_heads + p.value_heads + 1 + (p.decays ? p.value_heads : 0);
}
KRASIS_BOTH int64_t mix_runs(const krasis_cuda_gated_delta_args &p) {
    return p.rows ? p.tokens : (p.tokens + kMixRun - 1) / kMixRun;
}

// The rows of one sequence in this call, as a head's convolution sees them.
struct MixRows {
    const krasis_cuda_gated_delta_args &p;
    DeltaState state;
    int64_t first_row, count;  // the sequence's first row, and how many it has
    int64_t channel;           // the head's first

    // Two channels of a token, counted from the first row on; below 0: before it.
    KRASIS_DEVICE void load(int64_t token, int at, float (&pair)[2]) const {
        const int64_t before = p.conv_width - 1;
        pair[0] = pair[1] = 0;
        if (token >= 0) {
            load_pair(p.x, (first_row + token) * delta_columns(p) + channel + at, p.dtype, pair);
        } else if (state.start > 0) {
            const float *column = state.columns + (before + token) * delta_channels(p) + channel + at;
            pair[0] = column[0];
            pair[1] = column[1];
        }
    }

    // The last tokens before the next call, the oldest first. A column is read before it is written.
    KRASIS_DEVICE void keep_columns(int at) const {
        const int64_t before = p.conv_width - 1;
        for (int64_t j = 0; j < before; ++j) {
            float pair[2];
            load(count - before + j, at, pair);
            float *column = state.columns + j * delta_channels(p) + channel + at;
            column[0] = pair[0];
            column[1] = pair[1];
        }
    }

    KRASIS_DEVICE void load_taps(int at, float (&taps)[kMaxConvWidth][2]) const {
        const float *from = p.conv + (channel + at) * p.conv_width;
        KRASIS_UNROLL
        for (int j = 0; j < kMaxConvWidth; ++j) {
            const bool exists = j < p.conv_width;
            taps[j][0] = exists ? from[j] : 0.0f;
            taps[j][1] = exists ? from[p.conv_width + j] : 0.0f;
        }
    }

    // silu of the convolution. All loads before the first sum: each waits for memory.
    KRASIS_DEVICE void mix(int64_t token, int at, const float (&taps)[kMaxConvWidth][2], float (&sum)[2]) const {
        float pairs[kMaxConvWidth][2];
        KRASIS_UNROLL
        for (int j = 0; j < kMaxConvWidth; ++j) {
            pairs[j][0] = pairs[j][1] = 0;
            if (j < p.conv_width) load(token - (p.conv_width - 1) + j, at, pairs[j]);
        }
        sum[0] = sum[1] = 0;
        KRASIS_UNROLL
        for (int j = 0; j < kMaxConvWidth; ++j) {
            sum[0] = simt::fused_multiply_add(pairs[j][0], taps[j][0], sum[0]);
            sum[1] = simt::fused_multiply_add(pairs[j][1], taps[j][1], sum[1]);
        }
        sum[0] *= delta_sigmoid(sum[0]);
        sum[1] *= delta_sigmoid(sum[1]);
    }
};

// The logarithm of a decay.
KRASIS_DEVICE float mix_decay(float x, float a_log, float lower_bound) {
    const float rate = simt::exp_float(a_log);
    if (lower_bound != 0.0f) return lower_bound * delta_sigmoid(rate * x);
    const float decay = -rate * (x > 20.0f ? x : simt::log1p_float(simt::exp_float(x)));
    return decay < kLeastDecay ? kLeastDecay : decay;
}

// b becomes the step's size, a the logarithm of the decay.
KRASIS_DEVICE void mix_gates(const krasis_cuda_gated_delta_args &p, int64_t row, int lane) {
    float *b = p.gates + row * delta_gate_columns(p), *a = b + p.value_heads;
    for (int64_t head = lane; head < p.value_heads; head += simt::kWarp) {
        if (!p.decays) a[head] = mix_decay(a[head] + p.dt_bias[head], p.a_log[head], 0.0f);
        b[head] = delta_sigmoid(b[head]);
    }
}

// The same of the channels of a head.
KRASIS_DEVICE void mix_decays(const krasis_cuda_gated_delta_args &p, int64_t row, int64_t head, int lane) {
    const float *biases = p.dt_bias + head * p.key_dim;
    float *a = p.decays + (row * p.value_heads + head) * p.key_dim;
    for (int64_t i = lane; i < p.key_dim; i += simt::kWarp) {
        a[i] = mix_decay(a[i] + biases[i], p.a_log[head], p.lower_bound);
    }
}

KRASIS_KERNEL(kDeltaThreads, 1)
delta_mix_kernel(const krasis_cuda_gated_delta_args p) {
    const int lane = static_cast<int>(simt::thread_x() % simt::kWarp);
    const int64_t task =
        static_cast<int64_t>(simt::block_x()) * (kDeltaThreads / simt::kWarp) + simt::thread_x() / simt::kWarp;
    const int64_t runs = mix_runs(p), unit = task / runs, run = task % runs;
    if (unit >= mix_units(p)) return;  // the whole warp
    const int64_t length = p.rows ? 1 : kMixRun, first = run * length;
    const int64_t last = first + length < p.tokens ? first + length : p.tokens;
    if (const int64_t beyond = unit - 2 * p.key_heads - p.value_heads; beyond >= 0) {
        for (int64_t row = first; row < last; ++row) {
            beyond == 0 ? mix_gates(p, row, lane) : mix_decays(p, row, beyond - 1, lane);
        }
        return;
    }
    const DeltaState state = delta_state(p, first);
    if (state.start < 0) return;
    const bool is_value = unit >= 2 * p.key_heads, is_query = unit < p.key_heads;
    const int dim = static_cast<int>(is_value ? p.value_dim : p.key_dim);
    const int64_t channel =
        is_value ? 2 * p.key_heads * p.key_dim + (unit - 2 * p.key_heads) * p.value_dim : unit * p.key_dim;
    const MixRows rows{p, state, p.rows ? first : 0, p.rows ? 1 : p.tokens, channel};
    float taps[kMixPairs][kMaxConvWidth][2] = {};
    KRASIS_UNROLL
    for (int m = 0; m < kMixPairs; ++m) {
        const int at = 2 * lane + 2 * simt::kWarp * m;
        if (at < dim) rows.load_taps(at, taps[m]);
    }
    for (int64_t row = first; row < last; ++row) {
        float sums[kMixPairs][2], square = 0;
        KRASIS_UNROLL
        for (int m = 0; m < kMixPairs; ++m) {
            const int at = 2 * lane + 2 * simt::kWarp * m;
            sums[m][0] = sums[m][1] = 0;
            if (at < dim) rows.mix(row - rows.first_row, at, taps[m], sums[m]);
            square = simt::fused_multiply_add(sums[m][0], sums[m][0], square);
            square = simt::fused_multiply_add(sums[m][1], sums[m][1], square);
        }
        float scale = 1.0f;
        if (!is_value) scale = simt::reciprocal_sqrt(lane_sum(square, 1, 16) + 1e-6f);
        if (is_query) scale *= simt::reciprocal_sqrt(static_cast<float>(dim));
        KRASIS_UNROLL
        for (int m = 0; m < kMixPairs; ++m) {
            const int at = 2 * lane + 2 * simt::kWarp * m;
            if (at >= dim) continue;
            auto *to = static_cast<uint16_t *>(p.mixed) + row * delta_channels(p) + channel + at;
            *reinterpret_cast<uint32_t *>(to) = pack_pair(p.dtype, scale * sums[m][0], scale * sums[m][1]);
        }
    }
    if (run == 0 || p.rows) {
        for (int at = 2 * lane; at < dim; at += 2 * simt::kWarp) rows.keep_columns(at);
    }
}

}  // namespace krasis::cuda
