// route_kernel.h: scores of one row of router logits, compiled once per instruction set.
#pragma once

#include "activation_math.h"
#include "route.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

// f on 16 floats at a time; what lies behind the last is computed from zeros.
template <class F>
KRASIS_INLINE void each_16(const float *x, int64_t count, float *out, F &&f) {
    alignas(64) float last[16] = {};
    const int64_t whole = count / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) f(V16::load(x + i)).store(out + i);
    for (int64_t i = whole; i < count; ++i) last[i - whole] = x[i];
    if (whole < count) f(V16::load(last)).store(out + whole);
}

}  // namespace

void softmax_row(const float *logits, int64_t num_experts, float *probabilities) {
    const int64_t padded = (num_experts + 15) / 16 * 16;
    for (int64_t i = 0; i < num_experts; ++i) probabilities[i] = logits[i];
    for (int64_t i = num_experts; i < padded; ++i) probabilities[i] = -__builtin_inff();
    V16 largest = V16::load(probabilities);
    for (int64_t i = 16; i < padded; i += 16) largest = max(largest, V16::load(probabilities + i));
    const V16 shift = V16::set1(hmax(largest));
    V16 sums = V16::zero();
    for (int64_t i = 0; i < padded; i += 16) {
        const V16 e = exp(sub(V16::load(probabilities + i), shift));
        sums = add(sums, e);
        e.store(probabilities + i);
    }
    const V16 total = V16::set1(hsum(sums));
    for (int64_t i = 0; i < padded; i += 16) div(V16::load(probabilities + i), total).store(probabilities + i);
}

void sigmoid_row(const float *x, int64_t count, float *out) {
    each_16(x, count, out, [](V16 y) { return sigmoid(y); });
}

void sqrt_softplus_row(const float *x, int64_t count, float *out) {
    each_16(x, count, out, [](V16 y) { return softplus(y); });
    for (int64_t i = 0; i < count; ++i) out[i] = __builtin_sqrtf(out[i]);
}

void cap_row(const float *x, int64_t count, float cap, float *out) {
    const V16 caps = V16::set1(cap);
    each_16(x, count, out, [&](V16 y) { return mul(caps, tanh(div(y, caps))); });
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
