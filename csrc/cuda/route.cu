// route.cu: router logits of a few tokens, and the choice of experts from them.
#include "route_scores.cuh"
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kRouterThreads = 128, kRouterWarps = kRouterThreads / 32, kRouterTokens = 8;
constexpr int64_t kMaxRouteExperts = 1024, kMaxTopK = 64;

// One block an expert. shared: float [kRouterWarps][kTokens].
template <int kTokens>
KRASIS_KERNEL(kRouterThreads, 1)
router_kernel(const krasis_cuda_router_args p) {
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32, warp = thread / 32;
    const int64_t expert = simt::block_x();
    float sum[kTokens] = {};
    for (int64_t i = thread * kVector; i < p.k; i += kRouterThreads * kVector) {
        float weights[kVector];
        load8(p.weight, expert * p.k + i, p.weight_dtype, weights);
        KRASIS_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (t >= p.tokens) continue;
            float values[kVector];
            load8(p.x, t * p.k + i, KRASIS_F32, values);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) sum[t] = simt::fused_multiply_add(weights[j], values[j], sum[t]);
        }
    }
    auto *sums = reinterpret_cast<float *>(simt::shared_memory());
    KRASIS_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        const float whole = warp_sum(sum[t]);
        if (lane == 0) simt::shared_store(sums + warp * kTokens + t, whole);
    }
    simt::sync_threads();
    if (thread >= kTokens || thread >= p.tokens) return;
    float total = 0;
    KRASIS_UNROLL
    for (int w = 0; w < kRouterWarps; ++w) total += simt::shared_load<float>(sums + w * kTokens + thread);
    p.out[thread * p.num_experts + expert] = total;
}

// A softmax without extras. One warp a token. shared: float [kRouteWarps][num_experts], the experts not yet chosen.
KRASIS_KERNEL(kRouteThreads, 1)
route_kernel(const krasis_cuda_route_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t token = static_cast<int64_t>(simt::block_x()) * kRouteWarps + warp;
    if (token >= p.tokens) return;  // the whole warp
    Softmax softmax{reinterpret_cast<float *>(simt::shared_memory()) + warp * p.num_experts, p.num_experts, lane};
    softmax.run(p.logits + token * p.num_experts);

    constexpr float kTaken = -1;  // less than any probability
    uint64_t best = 0;            // of this lane's experts
    auto find_best = [&] {
        best = 0;
        for (int64_t e = lane; e < p.num_experts; e += 32) {
            const float value = simt::shared_load<float>(softmax.row + e);
            const uint64_t rank = value == kTaken ? 0 : rank_of(value, e);
            best = best < rank ? rank : best;
        }
    };
    for (int64_t e = lane; e < p.num_experts; e += 32) {
        const float value = simt::shared_load<float>(softmax.row + e);
        simt::shared_store(softmax.row + e, simt::divide(value, softmax.total));
    }
    find_best();
    int32_t id[2] = {0, 0};  // choices lane and lane + 32
    float weight[2] = {0, 0}, sum = 0;
    for (int choice = 0; choice < p.top_k; ++choice) {
        const uint64_t rank = warp_max(best);
        const auto chosen = static_cast<int32_t>(~static_cast<uint32_t>(rank));
        const float value = bits_float(static_cast<uint32_t>(rank >> 32));
        sum += value;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (choice == lane + 32 * i) {
                id[i] = chosen;
                weight[i] = value;
            }
        }
        if (chosen % 32 == lane) {
            simt::shared_store(softmax.row + chosen, kTaken);
            find_best();
        }
    }
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int64_t choice = lane + 32 * i;
        if (choice >= p.top_k) continue;
        write_choice(p, token * p.top_k + choice, id[i], p.normalize ? simt::divide(weight[i], sum) : weight[i]);
    }
}

int32_t check_scores(const krasis_cuda_route_args &a) {
    const bool kinds = a.score >= KRASIS_CUDA_SCORE_SOFTMAX && a.score <= KRASIS_CUDA_SCORE_SIGMOID_OF_TOP &&
                       (a.group_score == KRASIS_CUDA_GROUP_BEST_TWO || a.group_score == KRASIS_CUDA_GROUP_BEST);
    const bool numbers = a.logit_cap >= 0 && a.scale > 0 && a.sum_floor >= 0 && a.sum_epsilon >= 0;
    if (!kinds || !numbers || a.groups < 1 || a.top_groups < 1 || a.top_groups > a.groups) return KRASIS_ERR_ARGUMENT;
    if (a.groups > kMaxGroups || a.num_experts % a.groups) return KRASIS_ERR_SHAPE;
    return a.num_experts / a.groups * a.top_groups < a.top_k ? KRASIS_ERR_SHAPE : KRASIS_OK;
}

bool is_plain(const krasis_cuda_route_args &a) {
    const bool vectors = a.logit_bias || a.correction || a.expert_scale;
    const bool numbers = a.logit_cap > 0 || a.scale != 1 || a.sum_floor > 0 || a.sum_epsilon > 0;
    return a.score == KRASIS_CUDA_SCORE_SOFTMAX && !vectors && !numbers && a.top_groups == a.groups;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_router(const krasis_cuda_router_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_router_args &a = *args;
    const bool counts = a.tokens >= 0 && a.k > 0 && a.num_experts > 0 && a.num_experts <= kMaxBlocks;
    if (!counts || !a.x || !a.weight || !a.out || !is_dtype(a.weight_dtype)) return KRASIS_ERR_ARGUMENT;
    if (a.tokens > kRouterTokens || a.k % 64 || !is_aligned(a.x) || !is_aligned(a.weight)) return KRASIS_ERR_SHAPE;
    if (a.tokens == 0) return KRASIS_OK;
    const auto experts = static_cast<unsigned>(a.num_experts);
    if (a.tokens == 1)
        return launch<router_kernel<1>>({experts, kRouterThreads, kRouterWarps * sizeof(float)}, a, stream);
    constexpr size_t kSharedBytes = kRouterWarps * kRouterTokens * sizeof(float);
    return launch<router_kernel<kRouterTokens>>({experts, kRouterThreads, kSharedBytes}, a, stream);
}

int32_t krasis_cuda_route(const krasis_cuda_route_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_route_args &a = *args;
    if (a.tokens < 0 || a.num_experts <= 0 || a.top_k <= 0) return KRASIS_ERR_ARGUMENT;
    if (a.tokens > 0 && (!a.logits || !a.ids || !a.weights)) return KRASIS_ERR_ARGUMENT;
    if (a.num_experts > kMaxRouteExperts || a.top_k > kMaxTopK || a.top_k > a.num_experts) return KRASIS_ERR_SHAPE;
    const int32_t status = check_scores(a);
    if (status != KRASIS_OK) return status;
    const int64_t blocks = ceil_div(a.tokens, kRouteWarps);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const bool plain = is_plain(a);
    const size_t shared_bytes = kRouteWarps * static_cast<size_t>(a.num_experts) * sizeof(float) * (plain ? 1 : 2);
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(blocks), kRouteThreads, shared_bytes};
    return plain ? launch<route_kernel>(shape, a, stream) : launch<route_scores_kernel>(shape, a, stream);
}
