// gemm_float.h: the product of krasis_gemm_float. Included once by cpu/avx2/gemm.cpp and once by cpu/avx512/gemm.cpp.
#pragma once

#include "gemm_strip.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

template <int kDtype>
struct FloatWeight {
    static constexpr int64_t kBytes = kDtype == KRASIS_F32 ? 4 : 2;
    static KRASIS_INLINE V16 load(const uint8_t *p) {
        if constexpr (kDtype == KRASIS_F32) return V16::load(reinterpret_cast<const float *>(p));
        if constexpr (kDtype == KRASIS_BF16) return V16::load_bf16(reinterpret_cast<const uint16_t *>(p));
        return V16::load_f16(reinterpret_cast<const uint16_t *>(p));
    }
};

// Dot products of kTokens rows of x and kRows rows of the weight. Element k goes to lane k % 16, lanes are added in a
// fixed tree, so the bits depend on nothing but the two rows.
template <int kDtype, int kTokens, int kRows>
void float_dots(const FloatUnit &unit, int64_t t0, int64_t n0) {
    using W = FloatWeight<kDtype>;
    const uint8_t *weight = static_cast<const uint8_t *>(unit.weight) + n0 * unit.k * W::kBytes;
    const float *x = unit.x + t0 * unit.k;
    V16 sum[kTokens][kRows];
    for (auto &of_token : sum) {
        for (V16 &of_row : of_token) of_row = V16::zero();
    }
    const auto step = [&](const float *xs, int64_t ldx, const uint8_t *ws, int64_t ldw) __attribute__((always_inline)) {
        V16 w[kRows];
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) w[n] = W::load(ws + n * ldw);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            const V16 a = V16::load(xs + t * ldx);
#pragma GCC unroll 8
            for (int n = 0; n < kRows; ++n) sum[t][n] = fma(a, w[n], sum[t][n]);
        }
    };
    int64_t k = 0;
    for (; k + 16 <= unit.k; k += 16) step(x + k, unit.k, weight + k * W::kBytes, unit.k * W::kBytes);
    if (k < unit.k) {  // the rest, padded with zeros
        alignas(64) float xs[kTokens * 16] = {};
        alignas(64) uint8_t ws[kRows * 16 * W::kBytes] = {};
        for (int t = 0; t < kTokens; ++t) std::copy_n(x + t * unit.k + k, unit.k - k, xs + t * 16);
        for (int n = 0; n < kRows; ++n) {
            std::copy_n(weight + (n * unit.k + k) * W::kBytes, (unit.k - k) * W::kBytes, ws + n * 16 * W::kBytes);
        }
        step(xs, 16, ws, 16 * W::kBytes);
    }
    for (int t = 0; t < kTokens; ++t) {
        for (int n = 0; n < kRows; ++n) unit.out[(t0 + t) * unit.n + n0 + n] = hsum(sum[t][n]);
    }
}

// Few tokens: many rows at once hide the latency. More tokens: as many sums as there are registers.
template <int kDtype>
void float_unit(const FloatUnit &unit) {
    constexpr int kTokens = kLanes == 16 ? 4 : 3, kRows = kLanes == 16 ? 4 : 2, kLoneRows = kLanes == 16 ? 8 : 4;
    int64_t t = unit.t_begin;
    for (; t + kTokens <= unit.t_end; t += kTokens) {
        int64_t n = unit.n_begin;
        for (; n + kRows <= unit.n_end; n += kRows) float_dots<kDtype, kTokens, kRows>(unit, t, n);
        for (; n < unit.n_end; ++n) float_dots<kDtype, kTokens, 1>(unit, t, n);
    }
    for (; t < unit.t_end; ++t) {
        int64_t n = unit.n_begin;
        for (; n + kLoneRows <= unit.n_end; n += kLoneRows) float_dots<kDtype, 1, kLoneRows>(unit, t, n);
        for (; n < unit.n_end; ++n) float_dots<kDtype, 1, 1>(unit, t, n);
    }
}

void gemm_float_unit(const FloatUnit &unit) {
    if (unit.dtype == KRASIS_F32) float_unit<KRASIS_F32>(unit);
    if (unit.dtype == KRASIS_BF16) float_unit<KRASIS_BF16>(unit);
    if (unit.dtype == KRASIS_F16) float_unit<KRASIS_F16>(unit);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
