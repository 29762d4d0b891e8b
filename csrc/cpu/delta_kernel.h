// delta_kernel.h: the gated delta rule and what stands around it, compiled once per instruction set.
//
// The rule runs token after token: per head and token it takes 3 key_dim value_dim multiply-adds, fewer than the form
// in chunks, and its tile of the matrix (8 KiB at key_dim 128) stays in the nearest cache. So a sequence gets the same
// bits however it is cut into calls.
#pragma once

#include <cstring>

#include "activation_math.h"
#include "conv_ring.h"
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

// A token's query and key, and how much of the state stays: of all of it, or of each row, which the key is taken with
// when it asks what is known.
struct Token {
    const float *q, *k, *decays;
    V16 decay;

    template <bool kByRow>
    KRASIS_INLINE V16 decay_of(int64_t row) const {
        return kByRow ? V16::set1(decays[row]) : decay;
    }
    template <bool kByRow>
    KRASIS_INLINE V16 asking(int64_t row) const {
        return V16::set1(kByRow ? decays[row] * k[row] : k[row]);
    }
};

// One token: S = decay S + k delta; out = S^T q, and what S^T next.k is where there is a next token.
template <bool kByRow, bool kHasNext>
KRASIS_INLINE void step(float *state, int64_t key_dim, const Token &token, const Token &next, V16 delta, Dot4 &out,
                        Dot4 &known) {
    for (int64_t i = 0; i < key_dim; i += 4) {
        for (int64_t j = 0; j < 4; ++j) {  // unrolled: four chains of sums
            float *row = state + (i + j) * kDeltaTile;
            const V16 kept = mul(token.decay_of<kByRow>(i + j), V16::load(row));
            const V16 s = fma(V16::set1(token.k[i + j]), delta, kept);
            s.store(row);
            out.parts[j] = fma(V16::set1(token.q[i + j]), s, out.parts[j]);
            if constexpr (kHasNext) known.parts[j] = fma(next.asking<kByRow>(i + j), s, known.parts[j]);
        }
    }
}

// How much of a row stays.
KRASIS_INLINE V16 decay_of(V16 a, V16 rate, float lower_bound) {
    if (lower_bound != 0.0f) return exp(mul(V16::set1(lower_bound), sigmoid(mul(rate, a))));
    return exp(sub(V16::zero(), mul(rate, softplus(a))));
}

// Those of the channels of a row's keys, in place; b of its heads to how much is written.
KRASIS_INLINE void gates_by_channel(const krasis_gated_delta_args &args, int64_t row) {
    float *b = args.gates + row * args.value_heads, *a = args.decays + row * args.value_heads * args.key_dim;
    for (int64_t head = 0; head < args.value_heads; ++head) {
        const V16 rate = V16::set1(args.rates[head]);
        for (int64_t i = head * args.key_dim; i < (head + 1) * args.key_dim; i += 16) {
            decay_of(add(V16::load(a + i), V16::load(args.dt_bias + i)), rate, args.lower_bound).store(a + i);
        }
    }
    alignas(64) float last[16] = {};
    for (int64_t i = 0; i < args.value_heads; i += 16) {
        const int64_t count = args.value_heads - i < 16 ? args.value_heads - i : 16;
        std::memcpy(last, b + i, static_cast<size_t>(count) * sizeof(float));
        sigmoid(V16::load(last)).store(last);
        std::memcpy(b + i, last, static_cast<size_t>(count) * sizeof(float));
    }
}

}  // namespace

void delta_conv(const krasis_gated_delta_args &args, const krasis_span &span, int64_t unit) {
    const bool is_value = unit >= 2 * args.key_heads;
    const int64_t width = is_value ? args.value_dim : args.key_dim;
    const int64_t first = is_value ? 2 * args.key_heads * args.key_dim + (unit - 2 * args.key_heads) * args.value_dim
                                   : unit * args.key_dim;
    const int64_t channels = delta_channels(args);
    float *columns = delta_columns(args, span) + first;
    ConvRing ring(columns, args.conv_width, channels, width, span.start == 0);
    // q is scaled here, where its length is at hand.
    const float factor = unit < args.key_heads ? 1.0f / __builtin_sqrtf(static_cast<float>(args.key_dim)) : 1.0f;
    for (int64_t t = 0; t < span.rows; ++t) {
        float *x = args.x + (span.first_row + t) * args.ldx + first;
        for (int64_t i = 0; i < width; i += 16) silu(ring.mix(i, V16::load(x + i), args.conv + first)).store(x + i);
        ring.end_row();
        if (!is_value) to_unit(x, width, factor);
    }
    ring.keep(columns);
}

void delta_gates(const krasis_gated_delta_args &args, int64_t begin, int64_t end) {
    const int64_t heads = args.value_heads;
    alignas(64) float last[4][16] = {};
    for (int64_t row = begin; row < end; ++row) {
        if (args.decays) {
            gates_by_channel(args, row);
            continue;
        }
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

namespace {

template <bool kByRow>
void scan(const krasis_gated_delta_args &args, const krasis_span &span, int64_t head, int64_t tile) {
    const int64_t key_dim = args.key_dim, tiles = args.value_dim / kDeltaTile, heads = args.value_heads;
    const int64_t key_head = head / (heads / args.key_heads), keys = args.key_heads * key_dim;
    const int64_t at_v = 2 * keys + head * args.value_dim + tile * kDeltaTile, columns = delta_gate_columns(args);
    float *state = delta_matrices(args, span) + (head * tiles + tile) * key_dim * kDeltaTile;
    if (span.start == 0) std::memset(state, 0, static_cast<size_t>(key_dim * kDeltaTile) * sizeof(float));
    const auto token_of = [&](int64_t row) {
        const float *q = args.x + row * args.ldx + key_head * key_dim;
        if constexpr (kByRow) return Token{q, q + keys, args.decays + (row * heads + head) * key_dim, V16::zero()};
        return Token{q, q + keys, nullptr, V16::set1(args.gates[row * columns + heads + head])};
    };
    Token token = token_of(span.first_row);
    Dot4 known;  // S^T k of the token to come
    for (int64_t i = 0; i < key_dim; i += 4) {
        for (int64_t j = 0; j < 4; ++j) {
            const V16 row = V16::load(state + (i + j) * kDeltaTile);
            known.parts[j] = fma(token.asking<kByRow>(i + j), row, known.parts[j]);
        }
    }
    for (int64_t row = span.first_row, end = row + span.rows; row < end; ++row) {
        const V16 beta = V16::set1(args.gates[row * columns + head]);
        const V16 v = V16::load(args.x + row * args.ldx + at_v);
        const V16 delta = mul(beta, kByRow ? sub(v, known.total()) : fnma(token.decay, known.total(), v));
        Dot4 out, next_known;
        if (row + 1 < end) {
            const Token next = token_of(row + 1);
            step<kByRow, true>(state, key_dim, token, next, delta, out, next_known);
            token = next;
        } else {
            step<kByRow, false>(state, key_dim, token, token, delta, out, next_known);
        }
        known = next_known;
        out.total().store(args.out + (row * heads + head) * args.value_dim + tile * kDeltaTile);
    }
}

}  // namespace

void delta_scan(const krasis_gated_delta_args &args, const krasis_span &span, int64_t head, int64_t tile) {
    args.decays ? scan<true>(args, span, head, tile) : scan<false>(args, span, head, tile);
}

void delta_norm(const krasis_gated_delta_args &args, int64_t begin, int64_t end) {
    const int64_t dim = args.value_dim, heads = args.value_heads, channels = delta_channels(args);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
            float *out = args.out + (row * heads + head) * dim;
            const float *z =
                args.z ? args.z + (row * heads + head) * dim : args.x + row * args.ldx + channels + head * dim;
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
