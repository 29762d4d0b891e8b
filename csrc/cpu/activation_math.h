// activation_math.h: sigmoid, tanh and the activations between gate, up and down (per-ISA header).
#pragma once

#include "../krasis.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

KRASIS_INLINE V16 sigmoid(V16 x) { return div(V16::set1(1.0f), add(V16::set1(1.0f), exp(sub(V16::zero(), x)))); }

// To 3e-7 relative: by sigmoid(2 x), and where that cancels, |x| < 1/8, by its series.
KRASIS_INLINE V16 tanh(V16 x) {
    const V16 one = V16::set1(1.0f), square = mul(x, x);
    V16 series = fma(square, V16::set1(62.0f / 2835.0f), V16::set1(-17.0f / 315.0f));
    series = fma(series, square, V16::set1(2.0f / 15.0f));
    series = fma(series, square, V16::set1(-1.0f / 3.0f));
    series = fma(mul(series, square), x, x);
    const V16 wide = sub(one, div(V16::set1(2.0f), add(one, exp(add(x, x)))));
    const V16 bound = V16::set1(0.125f), size = abs(x);
    const V16 is_wide = zero_where_less(size, bound, one);  // 1 or 0: both sides are finite, but for a NaN
    return fma(is_wide, wide,
               mul(sub(one, is_wide), zero_where_less(sub(V16::zero(), size), sub(V16::zero(), bound), series)));
}

KRASIS_INLINE V16 clip(V16 x, float limit) { return max(V16::set1(-limit), min(V16::set1(limit), x)); }

KRASIS_INLINE V16 silu(V16 x) { return div(x, add(V16::set1(1.0f), exp(sub(V16::zero(), x)))); }

// log(1 + t) for t in [0, 1], to 2e-7 relative: 2 artanh(t / (2 + t)), whose argument is at most 1/3.
KRASIS_INLINE V16 log_one_plus(V16 t) {
    const V16 s = div(t, add(V16::set1(2.0f), t)), square = mul(s, s);
    V16 sum = V16::set1(1.0f / 17.0f);
    for (int odd = 15; odd > 0; odd -= 2) sum = fma(sum, square, V16::set1(1.0f / static_cast<float>(odd)));
    return mul(add(s, s), sum);
}

// log(1 + e^x).
KRASIS_INLINE V16 softplus(V16 x) { return add(max(V16::zero(), x), log_one_plus(exp(sub(V16::zero(), abs(x))))); }

// One krasis_activation of 16 gates and ups; a NaN stays one. Without a gate, gate is not looked at.
template <int32_t kKind>
KRASIS_INLINE V16 activate(V16 gate, V16 up, float limit, float alpha) {
    if constexpr (kKind == KRASIS_ACT_SILU) {
        return mul(silu(gate), up);
    } else if constexpr (kKind == KRASIS_ACT_GELU_TANH) {  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
        const V16 cubic = fma(mul(gate, gate), V16::set1(0.044715f), V16::set1(1.0f));
        const V16 twice_z = mul(mul(gate, V16::set1(1.5957691216057308f)), cubic);
        return mul(div(gate, add(V16::set1(1.0f), exp(sub(V16::zero(), twice_z)))), up);
    } else if constexpr (kKind == KRASIS_ACT_SWIGLU_OFFSET) {
        const V16 g = min(V16::set1(limit), gate);
        const V16 sloped = div(g, add(V16::set1(1.0f), exp(mul(g, V16::set1(-alpha)))));
        return mul(sloped, add(clip(up, limit), V16::set1(1.0f)));
    } else if constexpr (kKind == KRASIS_ACT_SILU_CLAMPED_BEFORE) {
        return mul(silu(min(V16::set1(limit), gate)), clip(up, limit));
    } else if constexpr (kKind == KRASIS_ACT_SILU_CLAMPED_AFTER) {
        return mul(min(V16::set1(limit), silu(gate)), clip(up, limit));
    } else {
        const V16 positive = max(V16::zero(), up);
        return mul(positive, positive);
    }
}

template <int32_t kKind>
struct Kind {
    static constexpr int32_t value = kKind;
};

// Calls f(Kind<kind>{}): what loops over elements is compiled for every kind.
template <class F>
KRASIS_INLINE void with_activation(int32_t kind, F &&f) {
    switch (kind) {
        case KRASIS_ACT_SILU:
            return f(Kind<KRASIS_ACT_SILU>{});
        case KRASIS_ACT_GELU_TANH:
            return f(Kind<KRASIS_ACT_GELU_TANH>{});
        case KRASIS_ACT_SWIGLU_OFFSET:
            return f(Kind<KRASIS_ACT_SWIGLU_OFFSET>{});
        case KRASIS_ACT_SILU_CLAMPED_BEFORE:
            return f(Kind<KRASIS_ACT_SILU_CLAMPED_BEFORE>{});
        case KRASIS_ACT_SILU_CLAMPED_AFTER:
            return f(Kind<KRASIS_ACT_SILU_CLAMPED_AFTER>{});
        default:
            return f(Kind<KRASIS_ACT_RELU_SQUARED>{});
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
