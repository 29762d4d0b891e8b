// hyper.cpp: krasis_hyper_weights, _sum and _add.
#include "hyper.h"

#include <cmath>

#include "rows.h"

namespace {

using namespace krasis;

bool is_shape(int64_t tokens, int64_t streams, int64_t k) {
    return tokens >= 0 && streams > 0 && streams <= kMostStreams && k > 0 && k % 16 == 0;
}

bool is_wide(const krasis_pool *pool) { return krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI; }

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// x [count, rows of n] divided by their sums + eps; stride: between the numbers of a row.
void divide(float *x, int64_t n, int64_t between_rows, int64_t stride, float eps) {
    for (int64_t row = 0; row < n; ++row) {
        float *first = x + row * between_rows, sum = 0.0f;
        for (int64_t i = 0; i < n; ++i) sum += first[i * stride];
        sum += eps;
        for (int64_t i = 0; i < n; ++i) first[i * stride] /= sum;
    }
}

void softmax(float *x, int64_t n, float eps) {
    float most = x[0], sum = 0.0f;
    for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] / sum + eps;
}

struct Weighing {
    const float *scale, *base;
    int64_t streams, n;
    float eps;
    int64_t rounds;
};

// A row's products, which inverse normalises, as weights: few numbers, so that one form serves all instruction sets.
void weigh(const Weighing &by, float inverse, float *mixes) {
    const int64_t streams = by.streams;
    for (int64_t i = 0; i < by.n; ++i) {
        const int64_t part = i < streams ? 0 : i < 2 * streams ? 1 : 2;
        mixes[i] = mixes[i] * inverse * by.scale[part] + by.base[i];
    }
    for (int64_t i = 0; i < streams; ++i) mixes[i] = sigmoid(mixes[i]) + by.eps;
    if (by.n == streams) return;
    for (int64_t i = streams; i < 2 * streams; ++i) mixes[i] = 2.0f * sigmoid(mixes[i]);
    float *comb = mixes + 2 * streams;
    for (int64_t row = 0; row < streams; ++row) softmax(comb + row * streams, streams, by.eps);
    for (int64_t round = 0; round < by.rounds; ++round) {
        if (round > 0) divide(comb, streams, streams, 1, by.eps);
        divide(comb, streams, 1, streams, by.eps);
    }
}

}  // namespace

int32_t krasis_hyper_weights(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                             float norm_eps, float *mixes, int64_t n, const float *scale, const float *base, float eps,
                             int64_t rounds) {
    if (!pool || !scale || !base || rounds < 0) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k) || (n != streams && n != (2 + streams) * streams)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !mixes) return KRASIS_ERR_ARGUMENT;
    const auto inverse = is_wide(pool) ? avx512::hyper_inverse_rms : avx2::hyper_inverse_rms;
    const Weighing by{scale, base, streams, n, eps, rounds};
    const int64_t wide = streams * k;
    parallel_rows(pool, tokens, wide, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) weigh(by, inverse(x + t * wide, wide, norm_eps), mixes + t * n);
    });
    return KRASIS_OK;
}

int32_t krasis_hyper_sum(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                         const float *shares, int64_t ld, float *out) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k) || (ld != 0 && ld < streams)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !shares || !out) return KRASIS_ERR_ARGUMENT;
    const HyperArgs args{x, nullptr, shares, streams, k, ld, out};
    const auto rows = is_wide(pool) ? avx512::hyper_sum : avx2::hyper_sum;
    parallel_rows(pool, tokens, streams * k, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
    return KRASIS_OK;
}

int32_t krasis_hyper_add(krasis_pool *pool, float *x, const float *added, const float *weights, int64_t tokens,
                         int64_t streams, int64_t k) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !added || !weights) return KRASIS_ERR_ARGUMENT;
    const HyperArgs args{nullptr, added, weights, streams, k, (2 + streams) * streams, x};
    const auto rows = is_wide(pool) ? avx512::hyper_add : avx2::hyper_add;
    parallel_rows(pool, tokens, streams * k, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
    return KRASIS_OK;
}
