// test_route_scores.cpp: the choice of experts by any kind of score, against float64 and plain loops.
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

struct Options {
    int32_t score;
    int64_t tokens, num_experts, top_k;
    bool normalize = true, logit_bias = false, correction = false, expert_scale = false;
    int32_t groups = 1, top_groups = 1, group_score = KRASIS_CUDA_GROUP_BEST_TWO;
    float scale = 1, sum_floor = 0, sum_epsilon = 0, logit_cap = 0;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One token's experts and weights.
struct Choice {
    std::vector<size_t> ids;
    std::vector<double> weights;
};

std::vector<double> scores_of(const Options &c, const std::vector<double> &logits) {
    std::vector<double> scores(logits);
    double total = 0;
    const double highest = *std::max_element(logits.begin(), logits.end());
    for (double l : logits) total += std::exp(l - highest);
    for (double &s : scores) {
        if (c.score == KRASIS_CUDA_SCORE_SOFTMAX) s = std::exp(s - highest) / total;
        if (c.score == KRASIS_CUDA_SCORE_SIGMOID) s = sigmoid(s);
        if (c.score == KRASIS_CUDA_SCORE_SQRT_SOFTPLUS) s = std::sqrt(std::log1p(std::exp(s)));
    }
    return scores;
}

// Groups that do not stay: their keys become -inf.
void drop_groups(const Options &c, std::vector<double> &keys) {
    const size_t count = static_cast<size_t>(c.groups), size = keys.size() / count;
    std::vector<double> value(count);
    for (size_t g = 0; g < count; ++g) {
        std::vector<double> own(keys.begin() + static_cast<long>(g * size),
                                keys.begin() + static_cast<long>((g + 1) * size));
        std::sort(own.rbegin(), own.rend());
        value[g] = own[0] + (c.group_score == KRASIS_CUDA_GROUP_BEST_TWO && size > 1 ? own[1] : 0);
    }
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return value[a] > value[b]; });
    for (size_t i = static_cast<size_t>(c.top_groups); i < count; ++i) {
        for (size_t e = order[i] * size; e < (order[i] + 1) * size; ++e) keys[e] = -INFINITY;
    }
}

struct Vectors {
    Array<float> bias, correction, expert_scale;
    Vectors(size_t experts, Random &random) : bias(experts), correction(experts), expert_scale(experts) {
        for (size_t e = 0; e < experts; ++e) {
            bias[e] = random.normal();
            correction[e] = random.normal();
            expert_scale[e] = 0.5f + std::fabs(random.normal());
        }
    }
};

Choice choose(const Options &c, const float *row, const Vectors &v) {
    std::vector<double> logits(static_cast<size_t>(c.num_experts));
    for (size_t e = 0; e < logits.size(); ++e) {
        logits[e] = row[e] + (c.logit_bias ? double{v.bias[e]} : 0.0);
        if (c.logit_cap > 0) logits[e] = c.logit_cap * std::tanh(logits[e] / c.logit_cap);
    }
    const std::vector<double> scores = scores_of(c, logits);
    std::vector<double> keys(scores);
    for (size_t e = 0; e < keys.size() && c.correction; ++e) keys[e] += v.correction[e];
    drop_groups(c, keys);
    Choice choice;
    choice.ids.resize(keys.size());
    std::iota(choice.ids.begin(), choice.ids.end(), size_t{0});
    std::stable_sort(choice.ids.begin(), choice.ids.end(), [&](size_t a, size_t b) { return keys[a] > keys[b]; });
    choice.ids.resize(static_cast<size_t>(c.top_k));
    double sum = 0, highest = -INFINITY, total = 0;
    for (size_t id : choice.ids) highest = std::fmax(highest, scores[id]);
    for (size_t id : choice.ids) total += std::exp(scores[id] - highest);
    for (size_t id : choice.ids) {
        double w = scores[id];
        if (c.score == KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP) w = std::exp(w - highest) / total;
        if (c.score == KRASIS_CUDA_SCORE_SIGMOID_OF_TOP) w = sigmoid(w);
        choice.weights.push_back(w);
        sum += w;
    }
    const double divisor = c.normalize ? std::fmax(sum, c.sum_floor) + c.sum_epsilon : 1;
    for (size_t j = 0; j < choice.ids.size(); ++j) {
        choice.weights[j] *= c.scale / divisor * (c.expert_scale ? double{v.expert_scale[choice.ids[j]]} : 1.0);
    }
    return choice;
}

krasis_cuda_route_args args_of(const Options &c, Array<float> &logits, Vectors &v, Array<int32_t> &ids,
                               Array<float> &weights) {
    krasis_cuda_route_args args = plain_route_args();
    args.logits = logits.upload();
    args.tokens = c.tokens;
    args.num_experts = c.num_experts;
    args.top_k = c.top_k;
    args.normalize = c.normalize;
    args.score = c.score;
    args.ids = ids.upload();
    args.weights = weights.upload();
    args.logit_bias = c.logit_bias ? v.bias.upload() : nullptr;
    args.correction = c.correction ? v.correction.upload() : nullptr;
    args.expert_scale = c.expert_scale ? v.expert_scale.upload() : nullptr;
    args.logit_cap = c.logit_cap;
    args.scale = c.scale;
    args.sum_floor = c.sum_floor;
    args.sum_epsilon = c.sum_epsilon;
    args.groups = c.groups;
    args.top_groups = c.top_groups;
    args.group_score = c.group_score;
    return args;
}

void check_options(const Options &c) {
    Random random(static_cast<uint64_t>(c.num_experts * 31 + c.score));
    const auto experts = static_cast<size_t>(c.num_experts), slots = static_cast<size_t>(c.tokens * c.top_k);
    Array<float> logits(static_cast<size_t>(c.tokens) * experts), weights(slots + 1);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = 3 * random.normal();
    Vectors vectors(experts, random);
    Array<int32_t> ids(slots + 1, -7);
    weights.poison();
    const auto args = args_of(c, logits, vectors, ids, weights);
    CHECK_OK(krasis_cuda_route(&args, nullptr));
    ids.download();
    weights.download();
    for (size_t t = 0; t < static_cast<size_t>(c.tokens); ++t) {
        const Choice wanted = choose(c, logits.data() + t * experts, vectors);
        for (size_t j = 0; j < wanted.ids.size(); ++j) {
            const size_t at = t * wanted.ids.size() + j;
            CHECK(ids[at] == static_cast<int32_t>(wanted.ids[j]));
            CHECK(std::fabs(weights[at] - wanted.weights[j]) <= 4e-6 * std::fabs(wanted.weights[j]));
        }
    }
    CHECK(ids[slots] == -7 && std::isnan(weights[slots]));
}

// Equal keys: the lower expert, the lower group. Not numbers: whatever is chosen, it is an expert, and none twice.
void check_ties_and_odd_logits() {
    Options c{KRASIS_CUDA_SCORE_SIGMOID, 1, 64, 4};
    c.correction = true;
    c.groups = 8;
    c.top_groups = 3;
    Random random(1);
    Vectors vectors(64, random);
    for (size_t e = 0; e < 64; ++e) vectors.correction[e] = -3;
    for (const float value : {0.25f, NAN, INFINITY, -INFINITY}) {
        Array<float> logits(64, value), weights(4);
        Array<int32_t> ids(4, -7);
        const auto args = args_of(c, logits, vectors, ids, weights);
        CHECK_OK(krasis_cuda_route(&args, nullptr));
        ids.download();
        std::vector<int32_t> chosen(ids.data(), ids.data() + 4);
        for (size_t j = 0; j < 4; ++j) CHECK(ids[j] >= 0 && ids[j] < 64 && (value != value || ids[j] == int32_t(j)));
        std::sort(chosen.begin(), chosen.end());
        CHECK(std::unique(chosen.begin(), chosen.end()) == chosen.end());
    }
}

void check_refusals() {
    Options c{KRASIS_CUDA_SCORE_SIGMOID, 1, 48, 4};
    Random random(2);
    Vectors vectors(48, random);
    Array<float> logits(48), weights(4);
    Array<int32_t> ids(4);
    const auto good = args_of(c, logits, vectors, ids, weights);
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_route(&args, nullptr) == status);
    };
    using Args = krasis_cuda_route_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.score = 5; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.groups = 0; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.top_groups = 2; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.scale = 0; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.sum_floor = NAN; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.group_score = 2; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.groups = 5; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.groups = 24; });  // the best group has two experts
}

}  // namespace

void run_route_scores() {
    check_options({KRASIS_CUDA_SCORE_SIGMOID, 5, 128, 8, true, false, true, false, 1, 1, 0, 2.5f, 0, 1e-20f});
    check_options({KRASIS_CUDA_SCORE_SIGMOID, 6, 256, 8, true, false, true, false, 8, 4, 0, 2.5f, 0, 1e-20f});
    check_options({KRASIS_CUDA_SCORE_SIGMOID, 3, 160, 6, false, true, false, true, 5, 2, KRASIS_CUDA_GROUP_BEST, 16});
    check_options({KRASIS_CUDA_SCORE_SOFTMAX, 4, 64, 6, true, false, true, false, 1, 1, 0, 1, 0.9f});
    check_options({KRASIS_CUDA_SCORE_SOFTMAX, 2, 60, 4, false, true, false, false, 1, 1, 0, 1, 0, 0, 4.0f});
    check_options({KRASIS_CUDA_SCORE_SOFTMAX, 9, 1024, 64, true, false, false, false, 64, 8});
    check_options({KRASIS_CUDA_SCORE_SQRT_SOFTPLUS, 3, 384, 6, true, false, true, false, 1, 1, 0, 1.5f, 0, 1e-20f});
    check_options({KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP, 5, 32, 4, false, true});
    check_options({KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP, 2, 128, 40, true, true, false, true});
    check_options({KRASIS_CUDA_SCORE_SIGMOID_OF_TOP, 4, 16, 1, false, false, false, false});
    check_ties_and_odd_logits();
    check_refusals();
}

}  // namespace test
