// pack_search.h: symmetric quantisation of one group of kLanes rows: the INT4 search for a scale, then the codes.
//
// w is [k][kLanes] floats, one row a lane. A scale is judged as stored (rounded to bfloat16 or float16), by
// sum(((w / s) - clamp(round(w / s)))^2) * s^2, weighted by the importance of its column if there is one. A negative
// scale is the mirror image: it lets the level -8 serve the positive extreme.
#pragma once

#include "pack_vector.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// Candidate scales are absmax / d. Near 8 the extreme just fits; larger d clip it in favour of finer steps. On Gaussian
// and heavier tails groups of at most 128 find their optimum in 5.8..11, long ones (a scale a channel) up to 30.
constexpr float kNarrow[] = {6.0f, 6.5f,  7.0f, 7.3f, 7.6f, 7.8f, 8.0f,  8.2f,
                             8.4f, 8.65f, 8.9f, 9.2f, 9.5f, 9.8f, 10.2f, 10.7f};
constexpr float kWide[] = {6.0f,  6.5f,  7.0f,  7.4f,  7.7f,  8.0f,  8.3f,  8.65f, 9.0f,  9.4f,  9.8f,
                           10.2f, 10.7f, 11.2f, 11.7f, 12.3f, 12.9f, 13.6f, 14.3f, 15.0f, 16.0f, 17.0f,
                           18.0f, 19.5f, 21.0f, 23.0f, 25.0f, 28.0f, 31.0f, 35.0f, 40.0f, 48.0f};
constexpr int kNarrowSteps = 2;  // least-squares steps after the grid
constexpr int kWideSteps = 3;
constexpr int64_t kNarrowGroup = 128;
constexpr int kBatch = kLanes == 16 ? 8 : 4;  // candidates that share one pass; divides both grids

struct Group {
    const float *w;  // [k][kLanes]
    int64_t k;
    const float *importance;  // [k] or null
    V absmax;
    int32_t scale_dtype;
};

// A scale as stored, with the sign apart. inverse carries the sign.
struct Scale {
    V magnitude, inverse, error;
};

template <int kCount, bool kWeighted>
inline void grid_errors(const Group &group, const V (&inverse)[kCount], V (&error)[kCount]) {
    const V magic = V::set1(kMagic), least = V::set1(kMagic - 8), most = V::set1(kMagic + 7);
    for (V &e : error) {
        e = V::zero();
    }
    for (int64_t i = 0; i < group.k; ++i) {
        const V w = V::load(group.w + i * kLanes);
        for (int c = 0; c < kCount; ++c) {
            const V level = sub(max(min(fma(w, inverse[c], magic), most), least), magic);
            const V e = fnma(w, inverse[c], level);
            const V weighted = kWeighted ? mul(e, V::set1(group.importance[i])) : e;
            error[c] = fma(e, weighted, error[c]);
        }
    }
}

struct Fit {
    V error, xq, qq;  // sums of (x - q)^2, x * q, q * q with x = w / s
};

template <bool kWeighted>
inline Fit fit(const Group &group, V inverse) {
    const V magic = V::set1(kMagic), least = V::set1(kMagic - 8), most = V::set1(kMagic + 7);
    Fit sums{V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < group.k; ++i) {
        const V w = V::load(group.w + i * kLanes);
        const V level = sub(max(min(fma(w, inverse, magic), most), least), magic);
        const V e = fnma(w, inverse, level);
        const V x = mul(w, inverse);
        const V importance = kWeighted ? V::set1(group.importance[i]) : V::zero();
        const V weighted_e = kWeighted ? mul(e, importance) : e;
        const V weighted_q = kWeighted ? mul(level, importance) : level;
        sums.error = fma(e, weighted_e, sums.error);
        sums.xq = fma(x, weighted_q, sums.xq);
        sums.qq = fma(level, weighted_q, sums.qq);
    }
    return sums;
}

// 1 or -1 a lane: the sign that lets -8 serve the side which has more beyond 7.5 steps of absmax / 8.
inline V better_sign(const Group &group) {
    const V bound = mul(group.absmax, V::set1(7.5f / 8)), negative_bound = sub(V::zero(), bound);
    V excess = V::zero();
    for (int64_t i = 0; i < group.k; ++i) {
        const V w = V::load(group.w + i * kLanes);
        excess = add(excess, sub(w, max(min(w, bound), negative_bound)));
    }
    return where_less(V::zero(), excess, V::set1(-1), V::set1(1));
}

// Errors are compared in units of base^2, so that weights of any magnitude compare without over- or underflow.
KRASIS_INLINE V comparable(V error, V magnitude, V base) {
    const V ratio = div(magnitude, base);
    return mul(error, mul(ratio, ratio));
}

KRASIS_INLINE void keep_better(Scale &best, V error, V magnitude, V inverse) {
    best.magnitude = where_less(error, best.error, magnitude, best.magnitude);
    best.inverse = where_less(error, best.error, inverse, best.inverse);
    best.error = where_less(error, best.error, error, best.error);
}

template <int kSize, bool kWeighted>
inline void search_grid(const Group &group, const float (&grid)[kSize], V sign, V base, Scale &best) {
    static_assert(kSize % kBatch == 0);
    for (int first = 0; first < kSize; first += kBatch) {
        V magnitude[kBatch], inverse[kBatch], error[kBatch];
        for (int c = 0; c < kBatch; ++c) {
            magnitude[c] = stored_scale(mul(group.absmax, V::set1(1.0f / grid[first + c])), group.scale_dtype);
            inverse[c] = div(sign, magnitude[c]);
        }
        grid_errors<kBatch, kWeighted>(group, inverse, error);
        for (int c = 0; c < kBatch; ++c) {
            keep_better(best, comparable(error[c], magnitude[c], base), magnitude[c], inverse[c]);
        }
    }
}

// s = <w, q> / <q, q> is the best scale for the codes at hand; its own codes may differ, so it must prove itself.
template <bool kWeighted>
inline void refine(const Group &group, int steps, V base, Scale &best) {
    Fit sums = fit<kWeighted>(group, best.inverse);
    for (int step = 0; step < steps; ++step) {
        const V sign = where_less(best.inverse, V::zero(), V::set1(-1), V::set1(1));
        const V ratio = div(sums.xq, max(sums.qq, V::set1(0x1p-100f)));
        const V magnitude = stored_scale(mul(best.magnitude, ratio), group.scale_dtype);
        const V inverse = div(sign, magnitude);
        const Fit next = fit<kWeighted>(group, inverse);
        const V error = comparable(next.error, magnitude, base);
        sums.xq = where_less(error, best.error, next.xq, sums.xq);
        sums.qq = where_less(error, best.error, next.qq, sums.qq);
        keep_better(best, error, magnitude, inverse);
    }
}

// The INT4 scale of a group: a grid over the magnitude, then least squares. Short groups without importance take the
// sign from better_sign (measured: at most 0.05 % more error than trying both); others try both signs on a wider grid.
inline Scale search_scale(const Group &group) {
    const V base = max(group.absmax, V::set1(least_scale(group.scale_dtype)));
    Scale best{V::set1(1), V::set1(1), V::set1(__builtin_inff())};
    if (group.importance) {
        search_grid<32, true>(group, kWide, V::set1(1), base, best);
        search_grid<32, true>(group, kWide, V::set1(-1), base, best);
        refine<true>(group, kWideSteps, base, best);
    } else if (group.k > kNarrowGroup) {
        search_grid<32, false>(group, kWide, V::set1(1), base, best);
        search_grid<32, false>(group, kWide, V::set1(-1), base, best);
        refine<false>(group, kWideSteps, base, best);
    } else {
        search_grid<16, false>(group, kNarrow, better_sign(group), base, best);
        refine<false>(group, kNarrowSteps, base, best);
    }
    return best;
}

// INT8: absmax / 127, as stored.
inline Scale absmax_scale(const Group &group) {
    const V magnitude = stored_scale(div(group.absmax, V::set1(127)), group.scale_dtype);
    return {magnitude, div(V::set1(1), magnitude), V::zero()};
}

// Scales that are given, of kLanes rows whose scales are `stride` apart: as stored.
inline Scale given_scale(const float *steps, int64_t stride, int32_t scale_dtype) {
    alignas(64) float values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        values[lane] = steps[lane * stride];
    }
    const V step = V::load(values);
    const V magnitude = stored_scale(abs(step), scale_dtype);
    const V sign = where_less(step, V::zero(), V::set1(-1), V::set1(1));
    return {magnitude, div(sign, magnitude), V::zero()};
}

// Sums of one pass over a group: squares in units of the scale, so that they cannot overflow.
struct GroupSums {
    V squared_error, squared_sum, max_abs_error;
};

// Writes codes u = q + 2^(bits-1) to codes[k][stride] and returns the scale to store: 1 where every code is zero.
inline V quantise(const Group &group, const Scale &scale, int32_t num_bits, uint8_t *codes, int64_t stride,
                  GroupSums &sums) {
    const float zero_point = num_bits == 4 ? 8 : 128;
    const V magic = V::set1(kMagic), least = V::set1(kMagic - zero_point), most = V::set1(kMagic + zero_point - 1);
    const VI base = VI::set1(kMagicBits - static_cast<int32_t>(zero_point));
    const V sign = where_less(scale.inverse, V::zero(), V::set1(-1), V::set1(1));
    const V stored = mul(sign, scale.magnitude);
    sums = {V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < group.k; ++i) {
        const V w = V::load(group.w + i * kLanes);
        const V rounded = max(min(fma(w, scale.inverse, magic), most), least);
        store_u8(codes + i * stride, bits(rounded) - base);
        const V error = fnma(stored, sub(rounded, magic), w);
        const V scaled_error = mul(error, scale.inverse), x = mul(w, scale.inverse);
        sums.squared_error = fma(scaled_error, scaled_error, sums.squared_error);
        sums.squared_sum = fma(x, x, sums.squared_sum);
        sums.max_abs_error = max(sums.max_abs_error, abs(error));
    }
    const V largest_level = sub(fma(group.absmax, abs(scale.inverse), magic), magic);
    return where_less(V::zero(), largest_level, stored, V::set1(1));
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
