// activation_kernel.h: rows of activations and of sums, compiled once per instruction set.
#pragma once

#include "activation.h"
#include "activation_math.h"
#include "acts_block.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

template <int32_t kKind>
void activate_row(const krasis_activation_args &args, int64_t row) {
    const int64_t size = args.intermediate;
    const float *gate = args.x + row * size * (has_gate(kKind) ? 2 : 1);
    const float *up = has_gate(kKind) ? gate + size : gate;
    const auto at = [&](int64_t i) {
        return activate<kKind>(V16::load(gate + i), V16::load(up + i), args.limit, args.alpha);
    };
    float *out = args.out ? args.out + row * size : nullptr;
    if (!args.acts) {
        for (int64_t i = 0; i < size; i += 16) at(i).store(out + i);
        return;
    }
    const krasis_acts &acts = *args.acts;
    const int64_t blocks = size / KRASIS_BLOCK_K;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * KRASIS_BLOCK_K, index = row * blocks + block;
        const V16 first = at(i), second = at(i + 16);
        quantize_block(low(first), high(first), low(second), high(second), acts.q + index * KRASIS_BLOCK_K,
                       acts.scale + index, acts.sum + index);
        if (out) {
            first.store(out + i);
            second.store(out + i + 16);
        }
    }
}

}  // namespace

void activation_rows(const krasis_activation_args &args, int64_t begin, int64_t end) {
    with_activation(args.kind, [&](auto kind) {
        for (int64_t row = begin; row < end; ++row) activate_row<decltype(kind)::value>(args, row);
    });
}

void add_rows(const krasis_add_rows_args &args, int64_t begin, int64_t end) {
    const int64_t whole = args.k / 8 * 8;
    for (int64_t row = begin; row < end; ++row) {
        float *out = args.out + row * args.k;
        const float *x = args.x ? args.x + row * args.k : nullptr;
        const V8 factor = args.logits ? low(sigmoid(V16::set1(args.logits[row]))) : V8::set1(1.0f);
        const float one = _mm256_cvtss_f32(factor.v);
        for (int64_t i = 0; i < whole; i += 8) {
            V8 sum = V8::load(out + i);
            if (args.bias) sum = add(sum, V8::load(args.bias + i));
            if (x) sum = fma(V8::load(x + i), factor, sum);
            if (args.scale != 0.0f) sum = mul(sum, V8::set1(args.scale));
            sum.store(out + i);
        }
        for (int64_t i = whole; i < args.k; ++i) {
            if (args.bias) out[i] += args.bias[i];
            if (x) out[i] = __builtin_fmaf(x[i], one, out[i]);
            if (args.scale != 0.0f) out[i] *= args.scale;
        }
    }
}

void gate_rows(float *x, const float *gates, int64_t count, int32_t gate) {
    for (int64_t i = 0; i < count; i += 16) {
        const V16 g = V16::load(gates + i);
        mul(V16::load(x + i), gate == KRASIS_GATE_SILU ? silu(g) : sigmoid(g)).store(x + i);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
