// mamba_kernel.h: the Mamba-2 scan and what stands around it, compiled once per instruction set.
//
// The scan runs token after token, as the gated delta rule does (delta_kernel.h): its tile of the matrix (8 KiB at
// state_dim 128) stays in the nearest cache, and a sequence gets the same bits however it is cut into calls.
#pragma once

#include <cstring>

#include "activation_math.h"
#include "mamba.h"
#include "norm_sum.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

void mamba_conv(const krasis_mamba2_args &args, const krasis_span &span, int64_t unit) {
    const int64_t channels = mamba_channels(args), first = unit * kMambaConvUnit;
    const int64_t width = channels - first < kMambaConvUnit ? channels - first : kMambaConvUnit;
    const int64_t before = args.conv_width - 1;
    const float *taps = args.conv + first, *bias = args.conv_bias ? args.conv_bias + first : nullptr;
    float *columns = mamba_columns(args, span) + first;
    alignas(64) float past[kMaxMambaConv - 1][kMambaConvUnit];  // a ring: the oldest is replaced by the newest
    for (int64_t j = 0; j < before; ++j) {
        if (span.start == 0) {
            std::memset(past[j], 0, static_cast<size_t>(width) * sizeof(float));
        } else {
            std::memcpy(past[j], columns + j * channels, static_cast<size_t>(width) * sizeof(float));
        }
    }
    int64_t oldest = 0;
    for (int64_t t = 0; t < span.rows; ++t) {
        float *x = args.x + (span.first_row + t) * args.ldx + mamba_inner(args) + first;
        for (int64_t i = 0; i < width; i += 16) {
            const V16 now = V16::load(x + i);
            V16 sum = bias ? V16::load(bias + i) : V16::zero();
            for (int64_t j = 0, at = oldest; j < before; ++j, at = at + 1 == before ? 0 : at + 1) {
                sum = fma(V16::load(past[at] + i), V16::load(taps + j * channels + i), sum);
            }
            sum = fma(now, V16::load(taps + before * channels + i), sum);
            if (before > 0) now.store(past[oldest] + i);
            silu(sum).store(x + i);
        }
        if (before > 0) oldest = oldest + 1 == before ? 0 : oldest + 1;
    }
    for (int64_t j = 0, at = oldest; j < before; ++j, at = at + 1 == before ? 0 : at + 1) {
        std::memcpy(columns + j * channels, past[at], static_cast<size_t>(width) * sizeof(float));
    }
}

void mamba_steps(const krasis_mamba2_args &args, int64_t begin, int64_t end) {
    alignas(64) float part[2][16] = {};
    for (int64_t row = begin; row < end; ++row) {
        float *steps = args.steps + row * args.heads;
        for (int64_t i = 0; i < args.heads; i += 16) {
            const int64_t count = args.heads - i < 16 ? args.heads - i : 16;
            const size_t bytes = static_cast<size_t>(count) * sizeof(float);
            std::memcpy(part[0], steps + i, bytes);
            std::memcpy(part[1], args.dt_bias + i, bytes);
            const V16 step = softplus(add(V16::load(part[0]), V16::load(part[1])));
            max(V16::set1(args.min_step), step).store(part[0]);
            std::memcpy(steps + i, part[0], bytes);
        }
    }
}

void mamba_scan(const krasis_mamba2_args &args, const krasis_span &span, int64_t head, int64_t tile) {
    const int64_t size = args.state_dim, inner = mamba_inner(args), tiles = args.head_dim / kMambaTile;
    const int64_t at_x = head * args.head_dim + tile * kMambaTile;
    const int64_t at_b = 2 * inner + head / (args.heads / args.groups) * size, at_c = at_b + args.groups * size;
    float *state = mamba_matrices(args, span) + (head * tiles + tile) * size * kMambaTile;
    if (span.start == 0) std::memset(state, 0, static_cast<size_t>(size * kMambaTile) * sizeof(float));
    const V16 rate = V16::set1(-args.rates[head]), skip = V16::set1(args.skip[head]);
    for (int64_t t = 0; t < span.rows; ++t) {
        const int64_t row = span.first_row + t;
        const float *in = args.x + row * args.ldx, *b = in + at_b, *c = in + at_c;
        const V16 x = V16::load(in + inner + at_x), dt = V16::set1(args.steps[row * args.heads + head]);
        const V16 decay = exp(mul(rate, dt)), added = mul(dt, x);
        V16 parts[4] = {V16::zero(), V16::zero(), V16::zero(), V16::zero()};
        for (int64_t i = 0; i < size; i += 4) {
            for (int64_t j = 0; j < 4; ++j) {  // unrolled: four chains of sums
                float *lane = state + (i + j) * kMambaTile;
                const V16 s = fma(V16::set1(b[i + j]), added, mul(decay, V16::load(lane)));
                s.store(lane);
                parts[j] = fma(V16::set1(c[i + j]), s, parts[j]);
            }
        }
        const V16 read = add(add(parts[0], parts[1]), add(parts[2], parts[3]));
        fma(skip, x, read).store(args.out + row * inner + at_x);
    }
}

void mamba_norm(const krasis_mamba2_args &args, int64_t begin, int64_t end) {
    const int64_t inner = mamba_inner(args), width = inner / args.groups;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t first = 0; first < inner; first += width) {
            float *out = args.out + row * inner + first;
            const float *z = args.x + row * args.ldx + first, *weight = args.gate_norm + first;
            for (int64_t i = 0; i < width; i += 16) {
                mul(V16::load(out + i), silu(V16::load(z + i))).store(out + i);
            }
            const V16 inverse = V16::set1(inverse_rms(out, width, args.eps));
            for (int64_t i = 0; i < width; i += 16) {
                mul(mul(V16::load(out + i), inverse), V16::load(weight + i)).store(out + i);
            }
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
