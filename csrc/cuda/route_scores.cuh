// route_scores.cuh: from router logits to the chosen experts and their weights. One warp works on a token; expert e is
// its lane e % 32's.
#pragma once

#include "krasis_cuda.h"
#include "row_norm.cuh"

namespace krasis::cuda {

inline constexpr int kRouteThreads = 128, kRouteWarps = kRouteThreads / 32;
inline constexpr int kMaxGroups = 64;

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
        for (int64_t e = lane; e < num_experts; e += 32) {
            const float logit = simt::load_written(logits + e);
            largest = largest < logit ? logit : largest;
        }
        for (int distance = 16; distance; distance /= 2) {
            const float other = simt::shuffle_xor(largest, distance);
            largest = largest < other ? other : largest;
        }
        float sum = 0;
        for (int64_t begin = 0; begin < num_experts; begin += 32) {
            const int64_t e = begin + lane;
            const float value = e < num_experts ? exp_as_cpu(simt::load_written(logits + e) - largest) : 0;
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
    const uint8_t holder = p.resident ? p.resident[id] : 0;  // 2: another GPU
    if (p.gpu_ids) p.gpu_ids[slot] = holder == 1 ? id : -1;
    if (p.cpu_ids) p.cpu_ids[slot] = holder == 0 ? id : -1;
    if (p.counts) simt::global_atomic_add(reinterpret_cast<unsigned long long *>(p.counts + id), 1ull);
}

// Larger for a larger value of either sign, then for a lower id; never 0. A NaN counts as the largest.
KRASIS_DEVICE uint64_t rank_of_signed(float value, int64_t id) {
    const uint32_t bits = float_bits(value), order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    const uint32_t high = value != value ? 0xffffffffu : order;
    return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

KRASIS_DEVICE float sigmoid_of(float x) {
    const float small = exp_as_cpu(x < 0 ? x : -x), below = small / (1 + small);
    return x < 0 ? below : 1 / (1 + small);
}

// cap * tanh(x / cap)
KRASIS_DEVICE float capped(float x, float cap) {
    const float y = x / cap, small = exp_as_cpu(y < 0 ? 2 * y : -2 * y), size = (1 - small) / (1 + small);
    return cap * (y < 0 ? -size : size);
}

// The scores of a token's experts: any kind, with what chooses beside what weighs.
struct Scores {
    const krasis_cuda_route_args &p;
    const float *logits;  // of the token
    float *keys, *row;    // shared, [num_experts] of this warp: what chooses; scores, or logits for scores of the top
    int lane;

    KRASIS_DEVICE bool of_top() const {
        return p.score == KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP || p.score == KRASIS_CUDA_SCORE_SIGMOID_OF_TOP;
    }

    KRASIS_DEVICE float logit(int64_t e) const {
        const float own = simt::load_written(logits + e), x = p.logit_bias ? own + p.logit_bias[e] : own;
        return p.logit_cap > 0 ? capped(x, p.logit_cap) : x;
    }

    // For a softmax: e^(l - largest) in the row. Returns their sum.
    KRASIS_DEVICE float exponentials() const {
        float largest = -bits_float(0x7f800000u), sum = 0;
        for (int64_t e = lane; e < p.num_experts; e += 32) largest = largest < logit(e) ? logit(e) : largest;
        for (int distance = 16; distance; distance /= 2) {
            const float other = simt::shuffle_xor(largest, distance);
            largest = largest < other ? other : largest;
        }
        for (int64_t e = lane; e < p.num_experts; e += 32) {
            const float value = exp_as_cpu(logit(e) - largest);
            simt::shared_store(row + e, value);
            sum += value;
        }
        return warp_sum(sum);
    }

    KRASIS_DEVICE float score(int64_t e, float total) const {
        if (p.score == KRASIS_CUDA_SCORE_SOFTMAX) return simt::divide(simt::shared_load<float>(row + e), total);
        const float x = logit(e);
        if (p.score == KRASIS_CUDA_SCORE_SIGMOID) return sigmoid_of(x);
        if (p.score != KRASIS_CUDA_SCORE_SQRT_SOFTPLUS) return x;
        return simt::square_root((x > 0 ? x : 0) + simt::log1p_float(exp_as_cpu(x > 0 ? -x : x)));
    }

    KRASIS_DEVICE void run() const {
        const float total = p.score == KRASIS_CUDA_SCORE_SOFTMAX ? exponentials() : 1;
        for (int64_t e = lane; e < p.num_experts; e += 32) {
            const float value = score(e, total);
            simt::shared_store(row + e, value);
            simt::shared_store(keys + e, p.correction ? value + p.correction[e] : value);
        }
    }
};

// Which groups stay, as bits; the same in all lanes. Reads the keys of other lanes: between barriers.
KRASIS_DEVICE uint64_t best_groups(const krasis_cuda_route_args &p, const float *keys, int lane) {
    const int64_t size = p.num_experts / p.groups;
    uint64_t own[2] = {0, 0}, chosen = 0;  // ranks of groups lane and lane + 32
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int group = lane + 32 * i;
        if (group >= p.groups) continue;
        float best = -bits_float(0x7f800000u), second = best;
        for (int64_t e = group * size; e < (group + 1) * size; ++e) {
            const float key = simt::shared_load<float>(keys + e);
            second = key > best ? best : key > second ? key : second;
            best = key > best ? key : best;
        }
        const bool both = p.group_score == KRASIS_CUDA_GROUP_BEST_TWO && size > 1;
        own[i] = rank_of_signed(both ? best + second : best, group);
    }
    for (int choice = 0; choice < p.top_groups; ++choice) {
        const uint64_t rank = warp_max(own[0] < own[1] ? own[1] : own[0]);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) own[i] = own[i] == rank ? 0 : own[i];
        chosen |= uint64_t{1} << (~static_cast<uint32_t>(rank) % 64);
    }
    return chosen;
}

// The weights of choices lane and lane + 32 from their scores.
KRASIS_DEVICE void weigh(const krasis_cuda_route_args &p, int lane, const int32_t (&id)[2], float (&weight)[2]) {
    float sum = 0;
    if (p.score == KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP) {
        float largest = lane < p.top_k ? weight[0] : -bits_float(0x7f800000u);
        if (lane + 32 < p.top_k) largest = largest < weight[1] ? weight[1] : largest;
        for (int distance = 16; distance; distance /= 2) {
            const float other = simt::shuffle_xor(largest, distance);
            largest = largest < other ? other : largest;
        }
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            weight[i] = lane + 32 * i < p.top_k ? exp_as_cpu(weight[i] - largest) : 0;
            sum += weight[i];
        }
        sum = warp_sum(sum);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) weight[i] = simt::divide(weight[i], sum);
        sum = 0;
    }
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        if (p.score == KRASIS_CUDA_SCORE_SIGMOID_OF_TOP) weight[i] = sigmoid_of(weight[i]);
        if (lane + 32 * i < p.top_k) sum += weight[i];
    }
    sum = warp_sum(sum);
    const float divisor = (sum < p.sum_floor ? p.sum_floor : sum) + p.sum_epsilon;
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        if (lane + 32 * i >= p.top_k) continue;
        if (p.normalize) weight[i] = simt::divide(weight[i], divisor);
        weight[i] *= p.scale;
        if (p.expert_scale) weight[i] *= p.expert_scale[id[i]];
    }
}

// A softmax without extras, of one token in one warp. row: shared, float [num_experts], the experts not yet chosen.
KRASIS_DEVICE void route_softmax(const krasis_cuda_route_args &p, int64_t token, float *row, int lane) {
    Softmax softmax{row, p.num_experts, lane};
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

// Any scores, of one token in one warp. keys: shared, float [2][num_experts]: keys, then scores. is_wanted: false for a
// warp that only comes to the barriers, which there are where groups are chosen.
KRASIS_DEVICE void route_scores(const krasis_cuda_route_args &p, int64_t token, bool is_wanted, float *keys, int lane) {
    Scores scores{p, p.logits + token * p.num_experts, keys, keys + p.num_experts, lane};
    scores.run();
    uint64_t groups = ~uint64_t{0};
    if (p.top_groups < p.groups) {
        simt::sync_threads();
        groups = best_groups(p, keys, lane);
    }
    const int64_t group_size = p.num_experts / p.groups;
    uint64_t best = 0;   // of this lane's experts that may still be chosen
    uint32_t taken = 0;  // bit i: expert lane + 32 * i is chosen already, at most 32 of them
    auto find_best = [&] {
        best = 0;
        for (int64_t e = lane; e < p.num_experts; e += 32) {
            if (taken >> (e / 32) & 1 || !(groups >> (e / group_size % 64) & 1)) continue;
            const uint64_t rank = rank_of_signed(simt::shared_load<float>(keys + e), e);
            best = best < rank ? rank : best;
        }
    };
    find_best();
    int32_t id[2] = {0, 0};  // choices lane and lane + 32
    float weight[2] = {0, 0};
    for (int choice = 0; choice < p.top_k; ++choice) {
        const auto chosen = static_cast<int32_t>(~static_cast<uint32_t>(warp_max(best)));
        const float own = chosen % 32 == lane ? simt::shared_load<float>(scores.row + chosen) : 0;
        const float value = simt::shuffle(own, chosen % 32);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (choice == lane + 32 * i) {
                id[i] = chosen;
                weight[i] = value;
            }
        }
        if (chosen % 32 == lane) {
            taken |= 1u << (chosen / 32);
            find_best();
        }
    }
    weigh(p, lane, id, weight);
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int64_t choice = lane + 32 * i;
        if (choice < p.top_k && is_wanted) write_choice(p, token * p.top_k + choice, id[i], weight[i]);
    }
}

}  // namespace krasis::cuda
