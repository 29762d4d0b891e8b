// test_route.cpp: router logits and the choice of experts against float64 and plain loops. That the choice has the very
// bits of the CPU's is tested in Python, where both libraries are at hand.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "route_arguments.h"
#include "suites.h"

namespace test {
namespace {

void check_router(int32_t dtype, int64_t tokens, int64_t k, int64_t num_experts) {
    Random random(static_cast<uint64_t>(k + tokens));
    const auto columns = static_cast<size_t>(k), experts = static_cast<size_t>(num_experts);
    Array<float> x(static_cast<size_t>(tokens) * columns), out(static_cast<size_t>(tokens) * experts + 1);
    Matrix weight(experts * columns, dtype);
    for (size_t i = 0; i < x.size(); ++i) x[i] = random.normal();
    for (size_t i = 0; i < experts * columns; ++i) weight.set(i, random.normal());
    out.poison();
    krasis_cuda_router_args args{x.upload(), weight.bytes.upload(), out.upload(), tokens, k, num_experts, dtype, 0};
    CHECK_OK(krasis_cuda_router(&args, nullptr));
    out.download();
    for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
        for (size_t e = 0; e < experts; ++e) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < columns; ++i) {
                const double term = double{x[t * columns + i]} * weight.get(e * columns + i);
                sum += term;
                size += std::fabs(term);
            }
            CHECK(std::fabs(out[t * experts + e] - sum) <= 1e-6 * size);
        }
    }
    CHECK(std::isnan(out[out.size() - 1]));
    auto wrong = args;
    wrong.tokens = 9;
    CHECK(krasis_cuda_router(&wrong, nullptr) == KRASIS_ERR_SHAPE);
    wrong = args;
    wrong.k = k + 32;
    CHECK(krasis_cuda_router(&wrong, nullptr) == KRASIS_ERR_SHAPE);
    wrong = args;
    wrong.weight_dtype = 7;
    CHECK(krasis_cuda_router(&wrong, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_router(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

struct Case {
    int64_t tokens, num_experts, top_k;
    bool normalize, split;
};

// Logits with ties on purpose: equal floats, so that softmax keeps them equal.
void fill_logits(Array<float> &logits, Random &random) {
    for (size_t i = 0; i < logits.size(); ++i) {
        logits[i] = random.below(4) ? 3 * random.normal() : static_cast<float>(random.below(3));
    }
}

std::vector<size_t> in_order(const float *logits, size_t num_experts) {
    std::vector<size_t> order(num_experts);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    return order;
}

void check_route(const Case &c) {
    Random random(static_cast<uint64_t>(c.num_experts + c.top_k));
    const auto experts = static_cast<size_t>(c.num_experts), top_k = static_cast<size_t>(c.top_k);
    const auto slots = static_cast<size_t>(c.tokens) * top_k;
    Array<float> logits(static_cast<size_t>(c.tokens) * experts), weights(slots + 1);
    fill_logits(logits, random);
    weights.poison();
    Array<int32_t> ids(slots + 1, -7), gpu_ids(slots + 1, -7), cpu_ids(slots + 1, -7);
    Array<uint8_t> resident(experts);
    for (size_t e = 0; e < experts; ++e)
        resident[e] = static_cast<uint8_t>(random.below(3) == 0 ? random.below(2) + 1 : 0);
    Array<int64_t> counts(experts, 1000000000000);
    krasis_cuda_route_args args = plain_route_args();
    args.logits = logits.upload();
    args.tokens = c.tokens;
    args.num_experts = c.num_experts;
    args.top_k = c.top_k;
    args.normalize = c.normalize;
    args.ids = ids.upload();
    args.weights = weights.upload();
    if (c.split) {
        args.resident = resident.upload();
        args.gpu_ids = gpu_ids.upload();
        args.cpu_ids = cpu_ids.upload();
        args.counts = counts.upload();
    }
    CHECK_OK(krasis_cuda_route(&args, nullptr));
    ids.download();
    weights.download();
    if (c.split) {
        gpu_ids.download();
        cpu_ids.download();
        counts.download();
    }

    std::vector<int64_t> chosen(experts, 1000000000000);
    for (size_t t = 0; t < static_cast<size_t>(c.tokens); ++t) {
        const float *row = logits.data() + t * experts;
        const std::vector<size_t> order = in_order(row, experts);
        double total = 0, sum = 0;
        for (size_t e = 0; e < experts; ++e) total += std::exp(double{row[e]} - row[order[0]]);
        for (size_t j = 0; j < top_k; ++j) sum += std::exp(double{row[order[j]]} - row[order[0]]);
        for (size_t j = 0; j < top_k; ++j) {
            const size_t at = t * top_k + j;
            const auto id = static_cast<int32_t>(order[j]);
            const double value = std::exp(double{row[order[j]]} - row[order[0]]) / (c.normalize ? sum : total);
            CHECK(ids[at] == id);
            CHECK(std::fabs(weights[at] - value) <= 2e-6 * value);
            ++chosen[order[j]];
            const uint8_t holder = resident[order[j]];
            CHECK(gpu_ids[at] == (!c.split ? -7 : holder == 1 ? id : -1));
            CHECK(cpu_ids[at] == (!c.split ? -7 : holder == 0 ? id : -1));
        }
    }
    CHECK(ids[slots] == -7 && gpu_ids[slots] == -7 && std::isnan(weights[slots]));
    for (size_t e = 0; e < experts && c.split; ++e) CHECK(counts[e] == chosen[e]);
}

// Not numbers, infinities: whatever is chosen, it is an expert, and none twice.
void check_odd_logits() {
    constexpr size_t kExperts = 40, kTopK = 5;
    const float infinity = INFINITY, nan = NAN;
    for (int kind = 0; kind < 4; ++kind) {
        Array<float> logits(kExperts, kind == 0 ? nan : kind == 1 ? -infinity : 0.5f), weights(kTopK);
        if (kind == 2) logits[17] = nan;
        if (kind == 3) logits[17] = infinity, logits[3] = -infinity;
        Array<int32_t> ids(kTopK, -7);
        krasis_cuda_route_args args = plain_route_args();
        args.logits = logits.upload();
        args.tokens = 1;
        args.num_experts = kExperts;
        args.top_k = kTopK;
        args.ids = ids.upload();
        args.weights = weights.upload();
        CHECK_OK(krasis_cuda_route(&args, nullptr));
        ids.download();
        for (size_t j = 0; j < kTopK; ++j) {
            CHECK(ids[j] >= 0 && ids[j] < static_cast<int32_t>(kExperts));
            for (size_t i = 0; i < j; ++i) CHECK(ids[i] != ids[j]);
        }
    }
    // So far apart that all but one vanish: ties at zero, lower id first.
    Array<float> logits(kExperts, -500.0f), weights(kTopK);
    logits[30] = 0;
    Array<int32_t> ids(kTopK, -7);
    krasis_cuda_route_args args = plain_route_args();
    args.logits = logits.upload();
    args.tokens = 1;
    args.num_experts = kExperts;
    args.top_k = kTopK;
    args.normalize = 1;
    args.ids = ids.upload();
    args.weights = weights.upload();
    CHECK_OK(krasis_cuda_route(&args, nullptr));
    ids.download();
    weights.download();
    for (size_t j = 0; j < kTopK; ++j) CHECK(ids[j] == (j == 0 ? 30 : static_cast<int32_t>(j) - 1));
    CHECK(weights[0] == 1.0f && weights[1] == 0.0f);

    auto wrong = args;
    wrong.top_k = 41;
    CHECK(krasis_cuda_route(&wrong, nullptr) == KRASIS_ERR_SHAPE);
    wrong.num_experts = 2000;
    wrong.top_k = 65;
    CHECK(krasis_cuda_route(&wrong, nullptr) == KRASIS_ERR_SHAPE);
    wrong = args;
    wrong.ids = nullptr;
    CHECK(krasis_cuda_route(&wrong, nullptr) == KRASIS_ERR_ARGUMENT);
}

}  // namespace

void run_route() {
    check_router(KRASIS_BF16, 1, 256, 7);
    check_router(KRASIS_F16, 8, 1088, 3);
    check_router(KRASIS_F32, 3, 64, 5);
    check_router(KRASIS_BF16, 1, 4096, 2);
    for (const Case &c :
         {Case{9, 128, 8, true, true}, Case{5, 6, 2, true, true}, Case{1, 1, 1, false, true},
          Case{4, 33, 33, false, true}, Case{3, 1024, 64, true, true}, Case{2, 160, 40, false, false}}) {
        check_route(c);
    }
    check_odd_logits();
}

}  // namespace test
