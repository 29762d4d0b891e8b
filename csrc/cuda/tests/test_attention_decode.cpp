// test_attention_decode.cpp: attention of one query against float64, over ragged numbers of keys, with NaNs behind
// them.
#include <cmath>
#include <string>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

struct Case {
    int64_t num_heads, num_kv_heads, head_dim, capacity;
    int32_t dtype;
    float size = 1;  // of the query: how peaked the softmax is
};

struct Problem {
    Case c;
    float scale;
    Matrix q, keys, values, out;
    Array<uint8_t> workspace;
    Array<int64_t> position;

    explicit Problem(const Case &given)
        : c(given),
          scale(1.0f / std::sqrt(static_cast<float>(c.head_dim))),
          q(count(c.num_heads * c.head_dim), c.dtype),
          keys(count(c.num_kv_heads * c.capacity * c.head_dim), c.dtype),
          values(count(c.num_kv_heads * c.capacity * c.head_dim), c.dtype),
          out(count(c.num_heads * c.head_dim), c.dtype),
          workspace(count(krasis_cuda_attention_workspace_bytes(c.num_heads, c.head_dim, c.capacity))),
          position(1) {
        Random random(static_cast<uint64_t>(c.capacity * 1000 + c.head_dim));
        for (size_t i = 0; i < count(c.num_heads * c.head_dim); ++i) q.set(i, random.normal() * c.size);
    }

    static size_t count(int64_t n) { return static_cast<size_t>(n); }

    size_t cell(int64_t kv_head, int64_t key) const { return count((kv_head * c.capacity + key) * c.head_dim); }

    // Keys and values up to the position, NaNs behind.
    krasis_cuda_attention_args args(int64_t at) {
        Random random(static_cast<uint64_t>(at + 17));
        keys.bytes.poison();
        values.bytes.poison();
        out.bytes.poison();
        workspace.poison();
        for (int64_t h = 0; h < c.num_kv_heads; ++h) {
            for (int64_t key = 0; key <= at; ++key) {
                for (size_t i = 0; i < count(c.head_dim); ++i) {
                    keys.set(cell(h, key) + i, random.normal());
                    values.set(cell(h, key) + i, random.normal() + static_cast<float>(h));
                }
            }
        }
        position[0] = at;
        krasis_cuda_attention_args a{};
        a.q = q.bytes.upload();
        a.k_cache = keys.bytes.upload();
        a.v_cache = values.bytes.upload();
        a.out = out.bytes.upload();
        a.position = position.upload();
        a.num_heads = c.num_heads;
        a.num_kv_heads = c.num_kv_heads;
        a.head_dim = c.head_dim;
        a.capacity = c.capacity;
        a.dtype = c.dtype;
        a.scale = scale;
        a.workspace = workspace.upload();
        a.workspace_bytes = static_cast<int64_t>(workspace.size());
        return a;
    }

    void check(int64_t at) const {
        for (int64_t h = 0; h < c.num_heads; ++h) {
            const int64_t kv = h / (c.num_heads / c.num_kv_heads);
            std::vector<double> weights;
            double highest = -INFINITY, total = 0;
            for (int64_t key = 0; key <= at; ++key) {
                double score = 0;
                for (size_t i = 0; i < count(c.head_dim); ++i) {
                    score += q.get(count(h * c.head_dim) + i) * keys.get(cell(kv, key) + i);
                }
                weights.push_back(score * scale);
                highest = std::fmax(highest, weights.back());
            }
            for (double &w : weights) total += w = std::exp(w - highest);
            for (size_t i = 0; i < count(c.head_dim); ++i) {
                double value = 0, size = 0;
                for (int64_t key = 0; key <= at; ++key) {
                    const double term = weights[count(key)] / total * values.get(cell(kv, key) + i);
                    value += term;
                    size += std::fabs(term);
                }
                const double got = out.get(count(h * c.head_dim) + i);
                CHECK(std::fabs(got - value) <= 3e-5 * size + out.rounding() * std::fabs(value) + 0x1p-24);
            }
        }
    }

    void run(int64_t at) {
        const auto a = args(at);
        CHECK_OK(krasis_cuda_attention_decode(&a, nullptr));
        out.bytes.download();
        const int before = failures;
        check(at);
        if (failures != before) {
            std::printf("  in heads %d of %d, dim %d, capacity %d, position %d\n", int(c.num_heads),
                        int(c.num_kv_heads), int(c.head_dim), int(c.capacity), int(at));
        }
    }
};

// One split, several, more keys than splits have at least; a stage not full, one full, one key more.
void check_lengths() {
    constexpr int64_t kPositions[] = {0, 1, 14, 15, 16, 17, 62, 63, 64, 65, 127, 128, 191, 255};
    Problem grouped({8, 2, 128, 256, KRASIS_BF16});
    for (int64_t at : kPositions) grouped.run(at);
    Problem small({4, 1, 64, 1, KRASIS_F16});
    small.run(0);
    Problem long_context({2, 1, 64, 9000, KRASIS_BF16});
    for (int64_t at : {4095, 4096, 8192, 8999}) long_context.run(at);
}

void check_heads() {
    // One head a kv head; more than a tile of 16; sizes that leave part of the tile's columns unused.
    const Case cases[] = {
        {3, 3, 128, 200, KRASIS_F16}, {20, 1, 64, 150, KRASIS_BF16},       {16, 1, 80, 150, KRASIS_F16},
        {6, 2, 96, 150, KRASIS_BF16}, {8, 1, 256, 300, KRASIS_BF16},       {34, 2, 208, 100, KRASIS_F16},
        {4, 2, 16, 100, KRASIS_BF16}, {8, 2, 128, 400, KRASIS_F16, 12.0f}, {8, 2, 256, 200, KRASIS_BF16, 12.0f}};
    for (const Case &c : cases) {
        Problem problem(c);
        problem.run(c.capacity - 1);
        problem.run(c.capacity / 3);
    }
}

void check_refusals() {
    Problem problem({4, 2, 64, 70, KRASIS_BF16});
    const auto good = problem.args(69);
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_attention_decode(&args, nullptr) == status);
    };
    using Args = krasis_cuda_attention_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.position = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.capacity = 0; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.head_dim = 72; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.head_dim = 272; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.num_heads = 5; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.workspace_bytes -= 4; });
    CHECK(krasis_cuda_attention_decode(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_attention_workspace_bytes(0, 64, 70) == 0);
}

#if !KRASIS_SIMT_DEVICE
void check_races() {
    namespace simt = krasis::simt;
    Problem problem({4, 1, 64, 17000, KRASIS_BF16});  // splits of five stages
    const auto args = problem.args(16999);
    for (const simt::Fault fault : {simt::Fault::kNoWait, simt::Fault::kWaitOneLess, simt::Fault::kNoBarrier}) {
        for (unsigned from = 0; from < 4; ++from) {
            simt::planned_fault = {fault, from};
            CHECK(krasis_cuda_attention_decode(&args, nullptr) == KRASIS_ERR_CUDA);
            simt::planned_fault = {};
            const std::string words = krasis_cuda_last_error();
            const char *expected = fault == simt::Fault::kNoBarrier ? "shared memory at byte" : "cp.async";
            CHECK(words.find(expected) != std::string::npos);
        }
    }
}
#endif

}  // namespace

void run_attention_decode() {
    check_lengths();
    check_heads();
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
