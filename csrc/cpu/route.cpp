// route.cpp: krasis_route_topk.
#include "route.h"

#include "../krasis.h"
#include "rows.h"

namespace {

// Keeps ids[0, top_k) sorted by probability, largest first; an equal one stays behind those found earlier.
void select_top(const float *probabilities, int64_t num_experts, int64_t top_k, int32_t *ids, float *weights) {
    int64_t filled = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
        const float value = probabilities[expert];
        if (filled == top_k && !(value > weights[top_k - 1])) continue;
        int64_t place = filled < top_k ? filled++ : top_k - 1;
        for (; place > 0 && value > weights[place - 1]; --place) {
            ids[place] = ids[place - 1];
            weights[place] = weights[place - 1];
        }
        ids[place] = static_cast<int32_t>(expert);
        weights[place] = value;
    }
}

void renormalize(float *weights, int64_t top_k) {
    float sum = 0.0f;
    for (int64_t j = 0; j < top_k; ++j) sum += weights[j];
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= sum;
}

}  // namespace

int32_t krasis_route_topk(krasis_pool *pool, const float *logits, int64_t tokens, int64_t num_experts, int64_t top_k,
                          int32_t normalize, int32_t *ids, float *weights) {
    if (!pool || tokens < 0 || num_experts <= 0 || top_k <= 0) return KRASIS_ERR_ARGUMENT;
    if (top_k > num_experts || num_experts > krasis::kMaxExperts) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!logits || !ids || !weights) return KRASIS_ERR_ARGUMENT;
    const auto softmax =
        krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::softmax_row : krasis::avx2::softmax_row;
    krasis::parallel_rows(pool, tokens, num_experts * 4, [&](int64_t begin, int64_t end) {
        alignas(64) float probabilities[krasis::kMaxExperts];
        for (int64_t token = begin; token < end; ++token) {
            softmax(logits + token * num_experts, num_experts, probabilities);
            select_top(probabilities, num_experts, top_k, ids + token * top_k, weights + token * top_k);
            if (normalize) renormalize(weights + token * top_k, top_k);
        }
    });
    return KRASIS_OK;
}
