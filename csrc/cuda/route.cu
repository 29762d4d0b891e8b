// route.cu: router logits of a few tokens, and the choice of experts from them.
#include "route_scores.cuh"
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kRouterThreads = 128, kRouterWarps = kRouterThreads / 32, kRouterTokens = 8;
constexpr int64_t kMaxRouteExperts = 1024, kMaxTopK = 64;
constexpr int64_t kMaxRowFloats = 12 * 1024;  // what every target has of shared memory without asking

// One block an expert. shared: float [kRouterWarps][kTokens].
template <int kTokens>
KRASIS_KERNEL(kRouterThreads, 1)
router_kernel(const krasis_cuda_router_args p) {
    simt::follow();
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

struct NormRouteParams : krasis_cuda_norm_route_args {
    float *route_logits;
    bool is_softmax;
};

// The norm, the logits and the choice of one token: one block an expert, each of which norms the row by itself; the
// last block to end chooses. shared: float [k], the normed row; [kNormWarps], [kRouterWarps]; then the choice's [2]
// [num_experts]; int32 [1].
KRASIS_KERNEL(kNormThreads, 1)
norm_route_kernel(const NormRouteParams p) {
    simt::let_next_begin();
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32, warp = thread / 32;
    const int64_t expert = simt::block_x(), num_experts = p.route.num_experts;
    auto *row = reinterpret_cast<float *>(simt::shared_memory()), *sums = row + p.k, *parts = sums + kNormWarps;
    auto *keys = parts + kRouterWarps;
    auto *is_last = reinterpret_cast<int32_t *>(keys + 2 * num_experts);
    const int64_t weight_bytes = p.k * (p.weight_dtype == KRASIS_F32 ? 4 : 2);
    simt::prefetch_before_wait(static_cast<const uint8_t *>(p.weight) + expert * weight_bytes, weight_bytes, thread,
                               kNormThreads);
    simt::wait_for_previous();
    const float scale = row_scale(p.hidden, 0, p.k, KRASIS_F32, p.eps, sums);
    for (int64_t i = thread * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector];
        load_normed8(p.hidden, 0, i, KRASIS_F32, p.norm, p.norm_dtype, scale, values);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) simt::shared_store(row + i + j, values[j]);
        if (p.x && expert == 0) store8(p.x, i, p.x_dtype, values);
        if (p.normed && expert == 0) store8(p.normed, i, KRASIS_F32, values);
    }
    simt::sync_threads();
    if (thread < kRouterThreads) {  // as router_kernel adds
        float sum = 0;
        for (int64_t i = thread * kVector; i < p.k; i += kRouterThreads * kVector) {
            float weights[kVector];
            load8(p.weight, expert * p.k + i, p.weight_dtype, weights);
            KRASIS_UNROLL
            for (int j = 0; j < kVector; ++j) {
                sum = simt::fused_multiply_add(weights[j], simt::shared_load<float>(row + i + j), sum);
            }
        }
        const float whole = warp_sum(sum);
        if (lane == 0) simt::shared_store(parts + warp, whole);
    }
    simt::sync_threads();
    if (thread == 0) {
        float total = 0;
        KRASIS_UNROLL
        for (int w = 0; w < kRouterWarps; ++w) total += simt::shared_load<float>(parts + w);
        p.route_logits[expert] = total;
        const auto blocks = static_cast<uint32_t>(num_experts);
        simt::shared_store(is_last, static_cast<int32_t>(simt::arrive_last(p.arrivals, blocks)));
    }
    simt::sync_threads();
    if (!simt::shared_load<int32_t>(is_last) || warp) return;
    if (p.is_softmax) {
        route_softmax(p.route, 0, keys, lane);
    } else {
        route_scores(p.route, 0, true, keys, lane);
    }
}

// A softmax without extras. One warp a token. shared: float [kRouteWarps][num_experts], the experts not yet chosen.
KRASIS_KERNEL(kRouteThreads, 1)
route_kernel(const krasis_cuda_route_args p) {
    simt::follow();
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t token = static_cast<int64_t>(simt::block_x()) * kRouteWarps + warp;
    if (token >= p.tokens) return;  // the whole warp
    route_softmax(p, token, reinterpret_cast<float *>(simt::shared_memory()) + warp * p.num_experts, lane);
}

// Any scores. One warp a token. shared: float [kRouteWarps][2][num_experts].
KRASIS_KERNEL(kRouteThreads, 1)
route_scores_kernel(const krasis_cuda_route_args p) {
    simt::follow();
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t wanted = static_cast<int64_t>(simt::block_x()) * kRouteWarps + warp;
    const int64_t token = wanted < p.tokens ? wanted : p.tokens - 1;  // all warps come to the barriers
    float *keys = reinterpret_cast<float *>(simt::shared_memory()) + 2 * warp * p.num_experts;
    route_scores(p, token, wanted < p.tokens, keys, lane);
}

int32_t check_scores(const krasis_cuda_route_args &a) {
    const bool kinds = a.score >= KRASIS_CUDA_SCORE_SOFTMAX && a.score <= KRASIS_CUDA_SCORE_SIGMOID_OF_TOP &&
                       (a.group_score == KRASIS_CUDA_GROUP_BEST_TWO || a.group_score == KRASIS_CUDA_GROUP_BEST);
    const bool numbers = a.logit_cap >= 0 && a.scale > 0 && a.sum_floor >= 0 && a.sum_epsilon >= 0;
    if (!kinds || !numbers || a.groups < 1 || a.top_groups < 1 || a.top_groups > a.groups) return KRASIS_ERR_ARGUMENT;
    if (a.groups > kMaxGroups || a.num_experts % a.groups) return KRASIS_ERR_SHAPE;
    return a.num_experts / a.groups * a.top_groups < a.top_k ? KRASIS_ERR_SHAPE : KRASIS_OK;
}

int32_t check_route(const krasis_cuda_route_args &a) {
    if (a.tokens < 0 || a.num_experts <= 0 || a.top_k <= 0) return KRASIS_ERR_ARGUMENT;
    if (a.tokens > 0 && (!a.logits || !a.ids || !a.weights)) return KRASIS_ERR_ARGUMENT;
    if (a.num_experts > kMaxRouteExperts || a.top_k > kMaxTopK || a.top_k > a.num_experts) return KRASIS_ERR_SHAPE;
    return check_scores(a);
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
        return launch_beside<router_kernel<1>>({experts, kRouterThreads, kRouterWarps * sizeof(float)}, a, stream);
    constexpr size_t kSharedBytes = kRouterWarps * kRouterTokens * sizeof(float);
    return launch_beside<router_kernel<kRouterTokens>>({experts, kRouterThreads, kSharedBytes}, a, stream);
}

int32_t krasis_cuda_norm_route(const krasis_cuda_norm_route_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_norm_route_args &a = *args;
    const bool pointers = a.hidden && a.norm && a.weight && a.arrivals && a.k > 0;
    const bool kinds = is_dtype(a.norm_dtype) && is_dtype(a.weight_dtype) && (!a.x || is_dtype(a.x_dtype));
    if (!pointers || !kinds || a.route.tokens != 1) return KRASIS_ERR_ARGUMENT;
    const int32_t status = check_route(a.route);
    if (status != KRASIS_OK) return status;
    const bool aligned =
        is_aligned(a.hidden) && is_aligned(a.norm) && is_aligned(a.weight) && is_aligned(a.x) && is_aligned(a.normed);
    if (a.k % 64 || !aligned || a.route.top_groups < a.route.groups) return KRASIS_ERR_SHAPE;
    const int64_t floats = a.k + kNormWarps + kRouterWarps + 2 * a.route.num_experts + 1;
    if (floats > kMaxRowFloats) return KRASIS_ERR_SHAPE;
    NormRouteParams p{};
    static_cast<krasis_cuda_norm_route_args &>(p) = a;
    p.route_logits = const_cast<float *>(a.route.logits);
    p.is_softmax = is_plain(a.route);
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(a.route.num_experts), kNormThreads,
                                          static_cast<size_t>(floats) * sizeof(float)};
    return launch_beside<norm_route_kernel>(shape, p, stream);
}

int32_t krasis_cuda_route(const krasis_cuda_route_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_route_args &a = *args;
    const int32_t status = check_route(a);
    if (status != KRASIS_OK) return status;
    const int64_t blocks = ceil_div(a.tokens, kRouteWarps);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const bool plain = is_plain(a);
    const size_t shared_bytes = kRouteWarps * static_cast<size_t>(a.num_experts) * sizeof(float) * (plain ? 1 : 2);
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(blocks), kRouteThreads, shared_bytes};
    return plain ? launch_rows<route_kernel>(a.tokens, shape, a, stream)
                 : launch_rows<route_scores_kernel>(a.tokens, shape, a, stream);
}
