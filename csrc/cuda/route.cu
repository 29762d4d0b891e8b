// route.cu: router logits of a few tokens, and the choice of experts from them.
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kRouterThreads = 128, kRouterWarps = kRouterThreads / 32, kRouterTokens = 8;
constexpr int kRouteThreads = 128, kRouteWarps = kRouteThreads / 32;
constexpr int64_t kMaxRouteExperts = 1024, kMaxTopK = 64;

KRASIS_DEVICE float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

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

// e^x by the polynomial of csrc/cpu/simd.h, operation for operation: x is at most 0 here.
KRASIS_DEVICE float exp_as_cpu(float x) {
    constexpr float kLeast = -87.33654f;
    if (!(x >= kLeast)) return x < kLeast ? 0 : x;  // NaN stays NaN
    const float n = simt::round_even(x * 1.44269504f);
    float r = simt::fused_multiply_add(-n, 0.693359375f, x);
    r = simt::fused_multiply_add(-n, -2.12194440e-4f, r);
    float q = simt::fused_multiply_add(0x1.6a2448p-10f, r, 0x1.1239d6p-7f);
    q = simt::fused_multiply_add(q, r, 0x1.5558f2p-5f);
    q = simt::fused_multiply_add(q, r, 0x1.555492p-3f);
    q = simt::fused_multiply_add(q, r, 0x1.fffffcp-2f);
    const float square = r * r;
    const float one_plus = simt::fused_multiply_add(square, q, r) + 1.0f;
    return one_plus * bits_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
}

// The CPU adds probabilities in 16 lanes, then lane i to i + 8, i + 4, i + 2, i + 1. Here lane i < 16 of the warp adds
// what lane i + 16 holds as well: the same order, the same bits.
struct Softmax {
    float *row;  // shared, of this warp; every cell is touched by one lane only
    int64_t num_experts;
    int lane;
    float total = 0;

    KRASIS_DEVICE void run(const float *logits) {
        float largest = -bits_float(0x7f800000u);
        for (int64_t e = lane; e < num_experts; e += 32) largest = largest < logits[e] ? logits[e] : largest;
        for (int distance = 16; distance; distance /= 2) {
            const float other = simt::shuffle_xor(largest, distance);
            largest = largest < other ? other : largest;
        }
        float sum = 0;
        for (int64_t begin = 0; begin < num_experts; begin += 32) {
            const int64_t e = begin + lane;
            const float value = e < num_experts ? exp_as_cpu(logits[e] - largest) : 0;
            if (e < num_experts) simt::shared_store(row + e, value);
            sum += value;
            sum += simt::shuffle_xor(value, 16);
        }
        for (int distance = 8; distance >= 1; distance /= 2) sum += simt::shuffle_xor(sum, distance);
        total = simt::shuffle(sum, 0);
    }
};

// Larger for a larger probability, then for a lower id; never 0. A NaN counts as the largest.
KRASIS_DEVICE uint64_t rank_of(float probability, int64_t id) {
    return static_cast<uint64_t>(float_bits(probability)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

KRASIS_DEVICE uint64_t warp_max(uint64_t value) {
    for (int distance = 16; distance; distance /= 2) {
        const uint64_t other = simt::shuffle_xor(value, distance);
        value = value < other ? other : value;
    }
    return value;
}

KRASIS_DEVICE void write_choice(const krasis_cuda_route_args &p, int64_t slot, int32_t id, float weight) {
    p.ids[slot] = id;
    p.weights[slot] = weight;
    const bool resident = p.resident && p.resident[id];
    if (p.gpu_ids) p.gpu_ids[slot] = resident ? id : -1;
    if (p.cpu_ids) p.cpu_ids[slot] = resident ? -1 : id;
    if (p.counts) simt::global_atomic_add(reinterpret_cast<unsigned long long *>(p.counts + id), 1ull);
}

// One warp a token. shared: float [kRouteWarps][num_experts], the experts not yet chosen.
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
    const int64_t blocks = ceil_div(a.tokens, kRouteWarps);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const size_t shared_bytes = kRouteWarps * static_cast<size_t>(a.num_experts) * sizeof(float);
    return launch<route_kernel>({static_cast<unsigned>(blocks), kRouteThreads, shared_bytes}, a, stream);
}
