// route.cpp: krasis_route: which experts a row of logits chooses, and what they weigh.
#include "route.h"

#include <algorithm>

#include "../krasis.h"
#include "rows.h"

namespace {

using krasis::kMaxExperts;

struct Scores {
    decltype(&krasis::avx2::softmax_row) softmax, sigmoid, sqrt_softplus;
    decltype(&krasis::avx2::cap_row) cap;
};

Scores scores_for(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        using namespace krasis::avx512;
        return {softmax_row, sigmoid_row, sqrt_softplus_row, cap_row};
    }
    using namespace krasis::avx2;
    return {softmax_row, sigmoid_row, sqrt_softplus_row, cap_row};
}

// The best values so far, largest first; an equal one stays behind those found earlier.
class Best {
  public:
    Best(int32_t *best_ids, float *best_values, int64_t size) : ids_(best_ids), values_(best_values), most_(size) {}

    void offer(int32_t id, float value) {
        if (count_ < most_ || value > values_[most_ - 1]) insert(id, value);
    }

  private:
    void insert(int32_t id, float value) {
        int64_t place = count_ < most_ ? count_++ : most_ - 1;
        for (; place > 0 && value > values_[place - 1]; --place) {
            ids_[place] = ids_[place - 1];
            values_[place] = values_[place - 1];
        }
        ids_[place] = id;
        values_[place] = value;
    }

    int32_t *ids_;
    float *values_;
    int64_t most_, count_ = 0;
};

// What a row of logits is turned into: arrays with room for a whole number of 16 floats.
struct Row {
    alignas(64) float logits[kMaxExperts], scores[kMaxExperts], choice[kMaxExperts];
    alignas(64) float best[kMaxExperts];  // of what was chosen, its choice, then its score
    float group_best[kMaxExperts];
    int32_t groups[kMaxExperts];
};

// The scores of one row of logits, in row.scores.
void score(const krasis_route_args &args, const Scores &scores, const float *logits, Row &row) {
    const int64_t count = args.num_experts;
    if (args.bias) {
        for (int64_t i = 0; i < count; ++i) row.logits[i] = logits[i] + args.bias[i];
        logits = row.logits;
    }
    if (args.logit_cap > 0.0f) {
        scores.cap(logits, count, args.logit_cap, row.logits);
        logits = row.logits;
    }
    if (args.score == KRASIS_SCORE_SOFTMAX) return scores.softmax(logits, count, row.scores);
    if (args.score == KRASIS_SCORE_SIGMOID) return scores.sigmoid(logits, count, row.scores);
    if (args.score == KRASIS_SCORE_SQRT_SOFTPLUS) return scores.sqrt_softplus(logits, count, row.scores);
    std::copy(logits, logits + count, row.scores);
}

float group_score(const krasis_route_args &args, const float *choice, int64_t size) {
    float values[2];
    int32_t ids[2];
    const bool two = args.group_score == KRASIS_GROUP_BEST_TWO && size > 1;
    Best best(ids, values, two ? 2 : 1);
    for (int64_t i = 0; i < size; ++i) best.offer(0, choice[i]);
    return two ? values[0] + values[1] : values[0];
}

// ids: the top_k of choice, among the best groups; their choices in row.best.
void choose(const krasis_route_args &args, const float *choice, Row &row, int32_t *ids) {
    Best best(ids, row.best, args.top_k);
    if (args.top_groups == args.groups) {
        for (int64_t e = 0; e < args.num_experts; ++e) best.offer(static_cast<int32_t>(e), choice[e]);
        return;
    }
    const int64_t size = args.num_experts / args.groups;
    Best groups(row.groups, row.group_best, args.top_groups);
    for (int64_t g = 0; g < args.groups; ++g) {
        groups.offer(static_cast<int32_t>(g), group_score(args, choice + g * size, size));
    }
    std::sort(row.groups, row.groups + args.top_groups);  // lower ids are found first
    for (int64_t i = 0; i < args.top_groups; ++i) {
        const int64_t first = row.groups[i] * size;
        for (int64_t e = first; e < first + size; ++e) best.offer(static_cast<int32_t>(e), choice[e]);
    }
}

// weights of the chosen, whose scores are given.
void weigh(const krasis_route_args &args, const int32_t *ids, float *weights) {
    if (args.renormalise) {
        float sum = 0.0f;
        for (int64_t j = 0; j < args.top_k; ++j) sum += weights[j];
        if (sum < args.sum_floor) sum = args.sum_floor;
        sum += args.sum_epsilon;
        for (int64_t j = 0; j < args.top_k; ++j) weights[j] /= sum;
    }
    if (args.scale != 1.0f) {
        for (int64_t j = 0; j < args.top_k; ++j) weights[j] *= args.scale;
    }
    if (!args.expert_scale) return;
    for (int64_t j = 0; j < args.top_k; ++j) weights[j] *= args.expert_scale[ids[j]];
}

void route_token(const krasis_route_args &args, const Scores &scores, int64_t token, Row &row) {
    int32_t *ids = args.ids + token * args.top_k;
    float *weights = args.weights + token * args.top_k;
    score(args, scores, args.logits + token * args.num_experts, row);
    const float *choice = row.scores;
    if (args.correction_bias) {
        for (int64_t i = 0; i < args.num_experts; ++i) row.choice[i] = row.scores[i] + args.correction_bias[i];
        choice = row.choice;
    }
    choose(args, choice, row, ids);
    for (int64_t j = 0; j < args.top_k; ++j) row.best[j] = row.scores[ids[j]];
    if (args.score == KRASIS_SCORE_SOFTMAX_OF_TOP) scores.softmax(row.best, args.top_k, row.best);
    if (args.score == KRASIS_SCORE_SIGMOID_OF_TOP) scores.sigmoid(row.best, args.top_k, row.best);
    std::copy(row.best, row.best + args.top_k, weights);
    weigh(args, ids, weights);
}

bool is_number(float x) { return x >= 0.0f && x <= 3.4e38f; }

int32_t check(const krasis_route_args &args) {
    if (args.tokens < 0 || args.num_experts <= 0 || args.top_k <= 0 || args.groups <= 0 || args.top_groups <= 0 ||
        args.score < KRASIS_SCORE_SOFTMAX || args.score > KRASIS_SCORE_SIGMOID_OF_TOP ||
        (args.group_score != KRASIS_GROUP_BEST_TWO && args.group_score != KRASIS_GROUP_BEST) ||
        !is_number(args.logit_cap) || !is_number(args.sum_floor) || !is_number(args.sum_epsilon) ||
        !is_number(args.scale)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.top_k > args.num_experts || args.num_experts > kMaxExperts || args.num_experts % args.groups != 0 ||
        args.top_groups > args.groups || args.top_groups * (args.num_experts / args.groups) < args.top_k) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.tokens > 0 && (!args.logits || !args.ids || !args.weights)) return KRASIS_ERR_ARGUMENT;
    return KRASIS_OK;
}

}  // namespace

int32_t krasis_route(krasis_pool *pool, const krasis_route_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const Scores scores = scores_for(pool);
    krasis::parallel_rows(pool, args->tokens, args->num_experts * 4, [&](int64_t begin, int64_t end) {
        Row row;
        for (int64_t token = begin; token < end; ++token) route_token(*args, scores, token, row);
    });
    return KRASIS_OK;
}
