// test_index.cpp: keys of an index over tokens, and its choice, against float64.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

size_t count(int64_t n) { return static_cast<size_t>(n); }

// Normal numbers, or small whole ones, whose sums are exact, so that many scores are equal.
float number(Random &random, bool whole) { return whole ? static_cast<float>(random.below(5) - 2) : random.normal(); }

struct Choice {
    int64_t heads, dim, budget, capacity, tokens;
    int32_t dtype;
    bool whole;
    Matrix cache;
    Array<float> q, weights, scores;
    Array<int32_t> chosen;

    Choice(int64_t num_heads, int64_t channels, int64_t best, int64_t keys, int64_t rows, int32_t type, bool are_whole)
        : heads(num_heads),
          dim(channels),
          budget(best),
          capacity(keys),
          tokens(rows),
          dtype(type),
          whole(are_whole),
          cache(count(keys * channels), type),
          q(count(rows * num_heads * channels)),
          weights(count(rows * num_heads)),
          scores(count(rows * columns())),
          chosen(count(rows * best), -7) {
        Random random(static_cast<uint64_t>(keys + channels));
        for (size_t i = 0; i < q.size(); ++i) q[i] = number(random, whole);
        for (size_t i = 0; i < weights.size(); ++i) weights[i] = number(random, whole);
    }
    int64_t columns() const { return (capacity + 3) / 4 * 4; }

    // Keys up to the position, NaNs behind.
    void fill(int64_t last) {
        Random random(static_cast<uint64_t>(last + 5));
        cache.bytes.poison();
        for (size_t i = 0; i < count((last + 1) * dim); ++i) cache.set(i, number(random, whole));
    }

    krasis_cuda_choose_args args(int64_t start) {
        scores.poison();
        krasis_cuda_choose_args a{};
        a.q = q.upload();
        a.weights = weights.upload();
        a.tokens = tokens;
        a.heads = heads;
        a.dim = dim;
        a.start = start;
        a.budget = budget;
        a.capacity = capacity;
        a.cache = cache.bytes.upload();
        a.dtype = dtype;
        a.chosen = chosen.upload();
        a.scores = scores.upload();
        a.score_columns = columns();
        return a;
    }

    double score(int64_t row, int64_t key, double &size) const {
        double sum = 0;
        size = 0;
        for (int64_t h = 0; h < heads; ++h) {
            double product = 0, most = 0;
            for (int64_t d = 0; d < dim; ++d) {
                const double term = q[count((row * heads + h) * dim + d)] * cache.get(count(key * dim + d));
                product += term;
                most += std::fabs(term);
            }
            const double weight = weights[count(row * heads + h)];
            sum += weight * std::max(0.0, product);
            size += std::fabs(weight) * most;
        }
        return sum;
    }

    // Scores are those of float64, and of these the best are chosen, the first of equals.
    void check_row(int64_t row, int64_t keys) const {
        std::vector<int32_t> order(count(keys));
        std::iota(order.begin(), order.end(), 0);
        if (keys > budget) {
            const float *own = scores.data() + row * columns();
            for (int64_t key = 0; key < keys; ++key) {
                double size;
                const double expected = score(row, key, size);
                CHECK(std::fabs(own[key] - expected) <= (whole ? 0 : 0x1p-17 * size));
            }
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return own[a] > own[b]; });
            order.resize(count(budget));
            std::sort(order.begin(), order.end());
        }
        for (size_t i = 0; i < order.size(); ++i) CHECK(chosen[count(row * budget) + i] == order[i]);
    }

    void run(int64_t start) {
        fill(start + tokens - 1);
        const auto a = args(start);
        CHECK_OK(krasis_cuda_choose(&a, nullptr));
        scores.download();
        chosen.download();
        for (int64_t row = 0; row < tokens; ++row) check_row(row, start + row + 1);
    }
};

// Fewer keys than the budget, as many, one more; more than a block scores and than a thread looks at.
void check_choice() {
    for (const bool whole : {true, false}) {
        Choice few(3, 48, 20, 70, 4, KRASIS_F16, whole);
        for (int64_t start : {0, 17, 40, 66}) few.run(start);
        Choice(70, 128, 64, 300, 2, KRASIS_BF16, whole).run(297);  // more heads than have room at once
        Choice(2, 256, 33, 140, 1, KRASIS_F16, whole).run(139);
        Choice(1, 16, 700, 4200, 1, KRASIS_BF16, whole).run(4150);
    }
}

// Rows of several sequences, one of which is nobody's, have the bits of rows alone; all scores may be equal.
void check_rows() {
    constexpr int64_t kPositions[] = {50, -1, 9, 69}, kOffset = 64;
    Choice one(3, 32, 16, 72, 4, KRASIS_F16, false);
    for (int64_t h = 0; h < 3; ++h) one.weights[count(9 + h)] = 0;
    one.fill(71);
    Array<uint8_t> slots(4 * (one.cache.bytes.size() + kOffset));
    const size_t slot = one.cache.bytes.size() + kOffset;
    uint8_t *memory = slots.upload();
    Array<krasis_cuda_row> rows(4);
    for (size_t r = 0; r < 4; ++r) {
        std::memcpy(slots.data() + r * slot + kOffset, one.cache.bytes.data(), one.cache.bytes.size());
        rows[r] = {kPositions[r], nullptr, memory + r * slot};
    }
    slots.upload();
    auto a = one.args(0);
    a.cache = nullptr;
    a.rows = rows.upload();
    a.values_offset = kOffset;
    CHECK_OK(krasis_cuda_choose(&a, nullptr));
    one.scores.download();
    one.chosen.download();
    for (int64_t r = 0; r < 4; ++r) {
        if (kPositions[r] >= 0) one.check_row(r, kPositions[r] + 1);
    }
    CHECK(one.chosen[16] == -7);
    for (size_t i = 0; i < 16; ++i) CHECK(one.chosen[48 + i] == static_cast<int32_t>(i));
}

void check_keys(bool interleaved, int64_t rotary, int32_t dtype, int32_t norm_dtype, bool has_q) {
    constexpr int64_t kTokens = 3, kHeads = 2, kDim = 48, kCapacity = 12, kStart = 7;
    Random random(31);
    Array<float> k(kTokens * kDim), q(kTokens * kHeads * kDim), bias(kDim), cos(kCapacity * count(rotary) / 2 + 1),
        sin(kCapacity * count(rotary) / 2 + 1);
    Matrix norm(kDim, norm_dtype), cache(kCapacity * kDim, dtype);
    for (size_t i = 0; i < k.size(); ++i) k[i] = 3 + random.normal();
    for (size_t i = 0; i < q.size(); ++i) q[i] = random.normal();
    for (size_t i = 0; i < count(kDim); ++i) norm.set(i, random.normal()), bias[i] = random.normal();
    for (size_t i = 0; i < cos.size(); ++i) {
        cos[i] = static_cast<float>(std::cos(0.3 * double(i)));
        sin[i] = static_cast<float>(std::sin(0.3 * double(i)));
    }
    std::vector<float> old(q.data(), q.data() + q.size());
    krasis_cuda_index_args a{};
    a.k = k.upload();
    a.q = has_q ? q.upload() : nullptr;
    a.tokens = kTokens;
    a.heads = kHeads;
    a.dim = kDim;
    a.start = kStart;
    a.norm = norm.bytes.upload();
    a.bias = bias.upload();
    a.dtype = dtype;
    a.norm_dtype = norm_dtype;
    a.eps = 1e-6f;
    a.interleaved = interleaved;
    a.cos = cos.upload();
    a.sin = sin.upload();
    a.max_positions = kCapacity;
    a.rotary_dims = rotary;
    a.cache = cache.bytes.upload();
    a.capacity = kCapacity;
    CHECK_OK(krasis_cuda_index_store(&a, nullptr));
    cache.bytes.download();
    q.download();
    auto turned = [&](std::vector<double> x, int64_t position) {
        for (int64_t i = 0; i < rotary / 2; ++i) {
            const size_t first = count(interleaved ? 2 * i : i),
                         second = count(interleaved ? 2 * i + 1 : rotary / 2 + i);
            const double c = cos[count(position * rotary / 2 + i)], s = sin[count(position * rotary / 2 + i)];
            const double x1 = x[first], x2 = x[second];
            x[first] = x1 * c - x2 * s;
            x[second] = x2 * c + x1 * s;
        }
        return x;
    };
    for (int64_t t = 0; t < kTokens; ++t) {
        std::vector<double> x(kDim);
        double mean = 0, variance = 0;
        for (size_t i = 0; i < count(kDim); ++i) mean += k[count(t * kDim) + i] / double(kDim);
        for (size_t i = 0; i < count(kDim); ++i) variance += std::pow(k[count(t * kDim) + i] - mean, 2) / double(kDim);
        for (size_t i = 0; i < count(kDim); ++i)
            x[i] = (k[count(t * kDim) + i] - mean) / std::sqrt(variance + 1e-6) * norm.get(i) + bias[i];
        x = turned(x, kStart + t);
        for (size_t i = 0; i < count(kDim); ++i) {
            const double found = cache.get(count((kStart + t) * kDim) + i);
            CHECK(std::fabs(found - x[i]) <= cache.rounding() * std::fabs(x[i]) + 1e-5);
        }
        for (size_t h = 0; has_q && h < count(kHeads); ++h) {
            const size_t at = (count(t) * kHeads + h) * kDim;
            const auto y =
                turned(std::vector<double>(old.begin() + int64_t(at), old.begin() + int64_t(at) + kDim), kStart + t);
            for (size_t i = 0; i < count(kDim); ++i) CHECK(std::fabs(q[at + i] - y[i]) <= 1e-5);
        }
    }
    CHECK(std::isnan(cache.get(count(kStart * kDim) - 1)) && std::isnan(cache.get(count((kStart + kTokens) * kDim))));
    a.start = kCapacity - 2;
    CHECK(krasis_cuda_index_store(&a, nullptr) == KRASIS_ERR_RANGE);
    a.start = kStart;
    a.rotary_dims = kDim + 2;
    CHECK(krasis_cuda_index_store(&a, nullptr) == KRASIS_ERR_SHAPE);
}

void check_refusals() {
    Choice one(3, 32, 16, 72, 2, KRASIS_F16, false);
    one.fill(71);
    const auto good = one.args(70);
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_choose(&args, nullptr) == status);
    };
    using Args = krasis_cuda_choose_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.chosen = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.budget = 0; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.dim = 24; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.dim = 272; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.heads = 1025; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.start = 71; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.score_columns = 68; });
    CHECK(krasis_cuda_choose(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_index_store(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

#if !KRASIS_SIMT_DEVICE
void check_races() {
    namespace simt = krasis::simt;
    Choice one(3, 32, 16, 72, 1, KRASIS_F16, false);
    one.fill(71);
    const auto args = one.args(71);
    for (unsigned from = 1; from < 2; ++from) {
        simt::planned_fault = {simt::Fault::kNoBarrier, from};
        CHECK(krasis_cuda_choose(&args, nullptr) == KRASIS_ERR_CUDA);
        simt::planned_fault = {};
    }
}
#endif

}  // namespace

void run_index() {
    check_choice();
    check_rows();
    check_keys(false, 32, KRASIS_F16, KRASIS_F32, true);
    check_keys(true, 48, KRASIS_BF16, KRASIS_BF16, true);
    check_keys(true, 0, KRASIS_F16, KRASIS_F16, false);
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
