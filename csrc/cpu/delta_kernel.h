// delta_kernel.h: the gated delta rule and what stands around it, compiled once per instruction set.
//
// The rule runs token after token: per head and token it takes 3 key_dim value_dim multiply-adds, fewer than the form
// in chunks, and its tile of the matrix (8 KiB at key_dim 128) stays in the nearest cache. So a sequence gets the same
// bits however it is cut into calls.
#pragma once

#include <cstring>

#include "activation_math.h"
#include "delta.h"
#include "norm_sum.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

// x to length 1, times factor.
KRASIS_INLINE void to_unit(float *x, int64_t size, float factor) {
    V16 squares = V16::zero();
    for (int64_t i = 0; i < size; i += 16) {
        const V16 a = V16::load(x + i);
        squares = fma(a, a, squares);
    }
    const V16 scale = V16::set1(factor / __builtin_sqrtf(hsum(squares) + 1e-6f));
    for (int64_t i = 0; i < size; i += 16) mul(V16::load(x + i), scale).store(x + i);
}

struct Dot4 {
    V16 parts[4] = {V16::zero(), V16::zero(), V16::zero(), V16::zero()};
    KRASIS_INLINE V16 total() const { return add(add(parts[0], parts[1]), add(parts[2], parts[3])); }
};

// One token: S = decay S + k delta; out = S^T q, and what S^T next_k is where there is a next token.
template <bool kHasNext>
KRASIS_INLINE void step(float *state, int64_t key_dim, const float *q, const float *k, const float *next_k, V16 decay,
                        V16 delta, Dot4 &out, Dot4 &next) {
    for (int64_t i = 0; i < key_dim; i += 4) {
        for (int64_t j = 0; j < 4; ++j) {  // unrolled: four chains of sums
            float *row = state + (i + j) * kDeltaTile;
            const V16 s = fma(V16::set1(k[i + j]), delta, mul(decay, V16::load(row)));
            s.store(row);
            out.parts[j] = fma(V16::set1(q[i + j]), s, out.parts[j]);
            if constexpr (kHasNext) next.parts[j] = fma(V16::set1(next_k[i + j]), s, next.parts[j]);
        }
    }
}

}  // namespace

void delta_conv(const krasis_gated_delta_args &args, const krasis_span &span, int64_t unit) {
    const bool is_value = unit >= 2 * args.key_heads;
    const int64_t width = is_value ? args.value_dim : args.key_dim;
    const int64_t first = is_value ? 2 * args.key_heads * args.key_dim + (unit - 2 * args.key_heads) * args.value_dim
                                   : unit * args.key_dim;
    const int64_t before = args.conv_width - 1, channels = delta_channels(args);
    const float *taps = args.conv + first;
    float *columns = delta_columns(args, span) + first;
    alignas(64) float past[kMaxConvWidth - 1][kMaxDeltaDim];  // a ring: the oldest is replaced by the newest
    for (int64_t j = 0; j < before; ++j) {
        if (span.start == 0) {
            std::memset(past[j], 0, static_cast<size_t>(width) * sizeof(float));
        } else {
            std::memcpy(past[j], columns + j * channels, static_cast<size_t>(width) * sizeof(float));
        }
    }
    // q is scaled here, where its length is at hand.
    const float factor = unit < args.key_heads ? 1.0f / __builtin_sqrtf(static_cast<float>(args.key_dim)) : 1.0f;
    int64_t oldest = 0;
    for (int64_t t = 0; t < span.rows; ++t) {
        float *x = args.x + (span.first_row + t) * args.ldx + first;
        for (int64_t i = 0; i < width; i += 16) {
            const V16 now = V16::load(x + i);
            V16 sum = V16::zero();
            for (int64_t j = 0, at = oldest; j < before; ++j, at = at + 1 == before ? 0 : at + 1) {
                sum = fma(V16::load(past[at] + i), V16::load(taps + j * channels + i), sum);
            }
            sum = fma(now, V16::load(taps + before * channels + i), sum);
            if (before > 0) now.store(past[oldest] + i);
            silu(sum).store(x + i);
        }
        if (before > 0) oldest = oldest + 1 == before ? 0 : oldest + 1;
        if (!is_value) to_unit(x, width, factor);
    }
    for (int64_t j = 0, at = oldest; j < before; ++j, at = at + 1 == before ? 0 : at + 1) {
        std::memcpy(columns + j * channels, past[at], static_cast<size_t>(width) * sizeof(float));
    }
}

void delta_gates(const krasis_gated_delta_args &args, int64_t begin, int64_t end) {
    const int64_t heads = args.value_heads;
    alignas(64) float last[4][16] = {};
    for (int64_t row = begin; row < end; ++row) {
        float *b = args.gates + row * 2 * heads, *a = b + heads;
        for (int64_t i = 0; i < heads; i += 16) {
            const int64_t count = heads - i < 16 ? heads - i : 16;
            const size_t bytes = static_cast<size_t>(count) * sizeof(float);
            std::memcpy(last[0], b + i, bytes);
            std::memcpy(last[1], a + i, bytes);
            std::memcpy(last[2], args.dt_bias + i, bytes);
            std::memcpy(last[3], args.rates + i, bytes);
            sigmoid(V16::load(last[0])).store(last[0]);
            const V16 softened = softplus(add(V16::load(last[1]), V16::load(last[2])));
            exp(sub(V16::zero(), mul(V16::load(last[3]), softened))).store(last[1]);
            std::memcpy(b + i, last[0], bytes);
            std::memcpy(a + i, last[1], bytes);
        }
    }
}

void delta_scan(const krasis_gated_delta_args &args, const krasis_span &span, int64_t head, int64_t tile) {
    const int64_t key_dim = args.key_dim, tiles = args.value_dim / kDeltaTile;
    const int64_t key_head = head / (args.value_heads / args.key_heads), keys = args.key_heads * key_dim;
    const int64_t at_v = 2 * keys + head * args.value_dim + tile * kDeltaTile;
    float *state = delta_matrices(args, span) + (head * tiles + tile) * key_dim * kDeltaTile;
    if (span.start == 0) std::memset(state, 0, static_cast<size_t>(key_dim * kDeltaTile) * sizeof(float));
    const float *q = args.x + span.first_row * args.ldx + key_head * key_dim;
    Dot4 known;  // S^T k of the token to come
    for (int64_t i = 0; i < key_dim; i += 4) {
        for (int64_t j = 0; j < 4; ++j) {
            const V16 row = V16::load(state + (i + j) * kDeltaTile);
            known.parts[j] = fma(V16::set1(q[keys + i + j]), row, known.parts[j]);
        }
    }
    for (int64_t t = 0; t < span.rows; ++t, q += args.ldx) {
        const int64_t row = span.first_row + t;
        const float *gates = args.gates + row * 2 * args.value_heads;
        const V16 beta = V16::set1(gates[head]), decay = V16::set1(gates[args.value_heads + head]);
        const V16 v = V16::load(args.x + row * args.ldx + at_v);
        const V16 delta = mul(beta, fnma(decay, known.total(), v));
        Dot4 out, next;
        if (t + 1 < span.rows) {
            step<true>(state, key_dim, q, q + keys, q + keys + args.ldx, decay, delta, out, next);
        } else {
            step<false>(state, key_dim, q, q + keys, nullptr, decay, delta, out, next);
        }
        known = next;
        out.total().store(args.out + row * args.value_heads * args.value_dim + head * args.value_dim +
                          tile * kDeltaTile);
    }
}

void delta_norm(const krasis_gated_delta_args &args, int64_t begin, int64_t end) {
    const int64_t dim = args.value_dim, heads = args.value_heads, channels = delta_channels(args);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
            float *out = args.out + (row * heads + head) * dim;
            const float *z = args.x + row * args.ldx + channels + head * dim;
            const V16 inverse = V16::set1(inverse_rms(out, dim, args.eps));
            for (int64_t i = 0; i < dim; i += 16) {
                const V16 normed = mul(mul(V16::load(out + i), inverse), V16::load(args.gate_norm + i));
                const V16 gate = V16::load(z + i);
                mul(normed, args.gate == KRASIS_GATE_SILU ? silu(gate) : sigmoid(gate)).store(out + i);
            }
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
