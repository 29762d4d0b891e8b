// test_latent_attention.cpp: attention over latents against float64, over ragged numbers of keys, with NaNs behind
// them.
#include <algorithm>
#include <cmath>
#include <string>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

size_t count(int64_t n) { return static_cast<size_t>(n); }

struct Case {
    int64_t num_heads, kv_rank, rope_dim, capacity, splits;
    int32_t dtype;
    float size = 1;  // of the query: how peaked the softmax is
};

struct Problem {
    static constexpr int64_t kNope = 32;
    Case c;
    int64_t width, head_stride;
    float scale;
    Matrix latent, rest, cache, out;
    Array<uint8_t> workspace;

    Problem(const Case &given, int64_t rows)
        : c(given),
          width(c.kv_rank + c.rope_dim),
          head_stride(kNope + c.rope_dim),
          scale(1.0f / std::sqrt(static_cast<float>(width))),
          latent(count(rows * c.num_heads * c.kv_rank), c.dtype),
          rest(count(rows * c.num_heads * head_stride), c.dtype),
          cache(count(c.capacity * width), c.dtype),
          out(count(rows * c.num_heads * c.kv_rank), c.dtype),
          workspace(count(
              std::max<int64_t>(16, krasis_cuda_latent_workspace_bytes(rows, c.num_heads, c.kv_rank, c.splits)))) {
        Random random(static_cast<uint64_t>(c.capacity * 1000 + c.kv_rank));
        for (size_t i = 0; i < count(rows * c.num_heads * c.kv_rank); ++i) latent.set(i, random.normal() * c.size);
        for (size_t i = 0; i < count(rows * c.num_heads * head_stride); ++i) rest.set(i, random.normal() * c.size);
    }

    // Keys up to the position, NaNs behind.
    void fill(int64_t last) {
        Random random(static_cast<uint64_t>(last + 17));
        cache.bytes.poison();
        for (size_t i = 0; i < count((last + 1) * width); ++i) cache.set(i, random.normal());
    }

    krasis_cuda_latent_attention_args args(int64_t start, int64_t num_rows) {
        out.bytes.poison();
        workspace.poison();
        krasis_cuda_latent_attention_args a{};
        a.q_latent = latent.bytes.upload();
        a.q_rope = rest.bytes.upload() + 2 * kNope;
        a.out = out.bytes.upload();
        a.q_stride = c.num_heads * head_stride;
        a.q_head_stride = head_stride;
        a.num_rows = num_rows;
        a.num_heads = c.num_heads;
        a.kv_rank = c.kv_rank;
        a.rope_dim = c.rope_dim;
        a.capacity = c.capacity;
        a.start = start;
        a.splits = c.splits;
        a.cache = cache.bytes.upload();
        a.workspace = workspace.upload();
        a.workspace_bytes = static_cast<int64_t>(workspace.size());
        a.dtype = c.dtype;
        a.scale = scale;
        return a;
    }

    void check_head(int64_t row, int64_t h, int64_t at) const {
        const size_t own = count((row * c.num_heads + h) * c.kv_rank);
        const size_t own_rest = count((row * c.num_heads + h) * head_stride + kNope);
        std::vector<double> weights;
        double highest = -INFINITY, total = 0;
        for (int64_t key = 0; key <= at; ++key) {
            double score = 0;
            for (size_t i = 0; i < count(c.kv_rank); ++i)
                score += latent.get(own + i) * cache.get(count(key * width) + i);
            for (size_t i = 0; i < count(c.rope_dim); ++i) {
                score += rest.get(own_rest + i) * cache.get(count(key * width + c.kv_rank) + i);
            }
            weights.push_back(score * scale);
            highest = std::fmax(highest, weights.back());
        }
        for (double &w : weights) total += w = std::exp(w - highest);
        for (size_t i = 0; i < count(c.kv_rank); ++i) {
            double value = 0, size = 0;
            for (int64_t key = 0; key <= at; ++key) {
                const double term = weights[count(key)] / total * cache.get(count(key * width) + i);
                value += term;
                size += std::fabs(term);
            }
            CHECK(std::fabs(out.get(own + i) - value) <= 3e-5 * size + out.rounding() * std::fabs(value) + 0x1p-24);
        }
    }

    void run(int64_t start, int64_t num_rows) {
        fill(start + num_rows - 1);
        const auto a = args(start, num_rows);
        CHECK_OK(krasis_cuda_latent_attention(&a, nullptr));
        out.bytes.download();
        const int before = failures;
        for (int64_t r = 0; r < num_rows; ++r) {
            for (int64_t h = 0; h < c.num_heads; ++h) check_head(r, h, start + r);
        }
        if (failures != before) {
            std::printf("  in heads %d, rank %d + %d, splits %d, position %d\n", int(c.num_heads), int(c.kv_rank),
                        int(c.rope_dim), int(c.splits), int(start));
        }
    }
};

void check_lengths() {
    Problem one({4, 64, 16, 200, 1, KRASIS_BF16}, 1);
    for (int64_t at : {0, 1, 30, 31, 32, 33, 63, 64, 199}) one.run(at, 1);
    Problem many({5, 96, 32, 300, 7, KRASIS_F16}, 1);
    for (int64_t at : {0, 31, 32, 100, 224, 299}) many.run(at, 1);
}

// A tile of heads not full, one more head than a tile has; the largest sizes; a peaked softmax; no shared part.
void check_shapes() {
    Problem({16, 512, 64, 90, 2, KRASIS_BF16}, 1).run(89, 1);
    Problem({33, 512, 64, 70, 1, KRASIS_F16}, 1).run(69, 1);
    Problem({20, 288, 48, 70, 3, KRASIS_BF16}, 1).run(68, 1);
    Problem({18, 256, 64, 70, 1, KRASIS_F16, 6.0f}, 1).run(69, 1);
    Problem({3, 64, 0, 70, 2, KRASIS_F16}, 1).run(69, 1);
    Problem({2, 128, 64, 4400, 128, KRASIS_BF16}, 1).run(4300, 1);
}

// Rows in a row; and rows of several sequences, each with the bits of its own call: one belongs to nobody.
void check_rows() {
    Problem({3, 64, 16, 80, 2, KRASIS_BF16}, 6).run(61, 6);
    Problem({5, 64, 16, 80, 3, KRASIS_F16}, 20).run(25, 20);  // of four tiles; some do not see the second split
    constexpr int64_t kPositions[] = {150, -1, 0, 64}, kOffset = 64;
    constexpr size_t kRows = 4;
    Problem problem({3, 96, 16, 160, 3, KRASIS_F16}, kRows);
    const size_t row_bytes = count(3 * 96 * 2), slot = problem.cache.bytes.size() + kOffset;
    Array<uint8_t> slots(kRows * slot);
    Array<krasis_cuda_row> rows(kRows);
    std::vector<std::vector<uint8_t>> expected;
    for (size_t r = 0; r < kRows; ++r) {
        const int64_t at = kPositions[r];
        problem.fill(at < 0 ? 7 : at);
        std::memcpy(slots.data() + r * slot + kOffset, problem.cache.bytes.data(), problem.cache.bytes.size());
        auto args = problem.args(at < 0 ? 0 : at, 1);
        args.q_latent = static_cast<const uint8_t *>(args.q_latent) + r * row_bytes;
        args.q_rope = static_cast<const uint8_t *>(args.q_rope) + r * count(args.q_stride) * 2;
        CHECK_OK(krasis_cuda_latent_attention(&args, nullptr));
        problem.out.bytes.download();
        expected.emplace_back(problem.out.bytes.data(), problem.out.bytes.data() + row_bytes);
    }
    uint8_t *memory = slots.upload();
    for (size_t r = 0; r < kRows; ++r) rows[r] = {kPositions[r], memory + r * slot, nullptr};
    auto args = problem.args(0, kRows);
    args.cache = nullptr;
    args.rows = rows.upload();
    args.keys_offset = kOffset;
    args.out = const_cast<void *>(args.q_latent);  // in place
    CHECK_OK(krasis_cuda_latent_attention(&args, nullptr));
    problem.latent.bytes.download();
    for (size_t r = 0; r < kRows; ++r) {
        const uint8_t *got = problem.latent.bytes.data() + r * row_bytes;
        if (kPositions[r] >= 0) CHECK(std::memcmp(got, expected[r].data(), row_bytes) == 0);
    }
}

// Rows of one sequence that attend to some positions have the bits of a sequence of these alone; one sees fewer than
// the budget, and one names a position that does not exist: it reads zeros.
void check_chosen(int64_t splits, int32_t dtype) {
    constexpr int64_t kStart = 60, kRows = 3, kBudget = 62;
    Problem whole({18, 64, 16, 80, splits, dtype}, kRows), alone({18, 64, 16, 80, splits, dtype}, kRows);
    whole.fill(kStart + kRows - 1);
    Array<int32_t> chosen(kRows * kBudget);
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < kBudget; ++i)  // all but one, from the second row on
            chosen[count(r * kBudget + i)] = static_cast<int32_t>(i + (r > 1 && i >= 20));
    }
    auto a = whole.args(kStart, kRows);
    a.chosen = chosen.upload();
    a.budget = kBudget;
    CHECK_OK(krasis_cuda_latent_attention(&a, nullptr));
    whole.out.bytes.download();
    const size_t row_bytes = count(18 * 64 * 2), key_bytes = count(alone.width * 2);
    for (int64_t r = 0; r < kRows; ++r) {
        const int64_t keys = std::min(kBudget, kStart + r + 1);
        for (int64_t i = 0; i < keys; ++i) {
            const int64_t from = chosen[count(r * kBudget + i)];
            std::memcpy(alone.cache.bytes.data() + count(i) * key_bytes,
                        whole.cache.bytes.data() + count(from) * key_bytes, key_bytes);
        }
        auto own = alone.args(keys - 1, 1);
        own.q_latent = static_cast<const uint8_t *>(own.q_latent) + count(r) * row_bytes;
        own.q_rope = static_cast<const uint8_t *>(own.q_rope) + count(r * own.q_stride) * 2;
        CHECK_OK(krasis_cuda_latent_attention(&own, nullptr));
        alone.out.bytes.download();
        CHECK(std::memcmp(alone.out.bytes.data(), whole.out.bytes.data() + count(r) * row_bytes, row_bytes) == 0);
    }
    chosen[3] = 80;
    a.chosen = chosen.upload();
    CHECK_OK(krasis_cuda_latent_attention(&a, nullptr));
    whole.out.bytes.download();
    CHECK(std::isfinite(whole.out.get(0)));
    a.budget = 0;
    CHECK(krasis_cuda_latent_attention(&a, nullptr) == KRASIS_ERR_ARGUMENT);
}

void check_refusals() {
    Problem problem({4, 64, 16, 70, 2, KRASIS_BF16}, 1);
    const auto good = problem.args(69, 1);
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_latent_attention(&args, nullptr) == status);
    };
    using Args = krasis_cuda_latent_attention_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.cache = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.splits = 129; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.workspace = nullptr; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.kv_rank = 544; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.rope_dim = 80; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.kv_rank = 80; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.workspace_bytes -= 4; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.start = 70; });
    CHECK(krasis_cuda_latent_attention(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_latent_workspace_bytes(0, 4, 64, 2) == 0);
}

#if !KRASIS_SIMT_DEVICE
void check_races() {
    namespace simt = krasis::simt;
    Problem problem({4, 64, 16, 200, 1, KRASIS_BF16}, 1);
    problem.fill(199);
    const auto args = problem.args(199, 1);
    for (const simt::Fault fault : {simt::Fault::kNoWait, simt::Fault::kNoBarrier}) {
        for (unsigned from = 0; from < 6; ++from) {
            simt::planned_fault = {fault, from};
            CHECK(krasis_cuda_latent_attention(&args, nullptr) == KRASIS_ERR_CUDA);
            simt::planned_fault = {};
            const std::string words = krasis_cuda_last_error();
            const char *expected = fault == simt::Fault::kNoBarrier ? "shared memory at byte" : "cp.async";
            CHECK(words.find(expected) != std::string::npos);
        }
    }
}
#endif

}  // namespace

void run_latent_attention() {
    check_lengths();
    check_shapes();
    check_rows();
    check_chosen(1, KRASIS_F16);
    check_chosen(3, KRASIS_BF16);
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
