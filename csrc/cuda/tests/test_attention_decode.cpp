// test_attention_decode.cpp: attention of one query against float64, over ragged numbers of keys, with NaNs behind
// them.
#include <algorithm>
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
    int64_t window = 0;
    bool with_sinks = false;
    bool codes = false;  // keys and values of 8 bits
    int64_t ring = 0;

    int64_t places() const { return ring ? ring : capacity; }
};

// Codes [rows, dim], then a scale a row.
struct CodeRows {
    size_t rows, dim;
    Array<uint8_t> bytes;

    CodeRows(size_t num_rows, size_t head_dim) : rows(num_rows), dim(head_dim), bytes(num_rows * (head_dim + 4)) {}

    void set_scale(size_t row, float scale) { std::memcpy(bytes.data() + rows * dim + 4 * row, &scale, 4); }
    void set(size_t cell, int code) { bytes[cell] = static_cast<uint8_t>(static_cast<int8_t>(code)); }
};

struct Problem {
    Case c;
    float scale;
    Matrix q, keys, values, out;
    CodeRows key_codes, value_codes;
    Array<uint8_t> workspace;
    Array<int64_t> position;
    Array<float> sinks;

    explicit Problem(const Case &given)
        : c(given),
          scale(1.0f / std::sqrt(static_cast<float>(c.head_dim))),
          q(count(c.num_heads * c.head_dim), c.dtype),
          keys(count(c.num_kv_heads * c.places() * c.head_dim), c.codes ? KRASIS_F32 : c.dtype),
          values(count(c.num_kv_heads * c.places() * c.head_dim), c.codes ? KRASIS_F32 : c.dtype),
          out(count(c.num_heads * c.head_dim), c.dtype),
          key_codes(c.codes ? count(c.num_kv_heads * c.places()) : 1, count(c.head_dim)),
          value_codes(c.codes ? count(c.num_kv_heads * c.places()) : 1, count(c.head_dim)),
          workspace(count(krasis_cuda_attention_workspace_bytes(1, c.num_heads, c.head_dim, c.capacity))),
          position(1),
          sinks(count(c.num_heads)) {
        Random random(static_cast<uint64_t>(c.capacity * 1000 + c.head_dim));
        for (size_t i = 0; i < count(c.num_heads * c.head_dim); ++i) q.set(i, random.normal() * c.size);
        for (size_t h = 0; h < sinks.size(); ++h) sinks[h] = 2 * random.normal() + (h == 0 ? 6.0f : 0.0f);
    }

    int64_t first_key(int64_t at) const { return c.window ? std::max<int64_t>(0, at + 1 - c.window) : 0; }

    static size_t count(int64_t n) { return static_cast<size_t>(n); }

    size_t cell(int64_t kv_head, int64_t key) const {
        return count((kv_head * c.places() + key % c.places()) * c.head_dim);
    }

    Array<uint8_t> &key_memory() { return c.codes ? key_codes.bytes : keys.bytes; }
    Array<uint8_t> &value_memory() { return c.codes ? value_codes.bytes : values.bytes; }

    // One key or value: its codes, of a scale of any size, and the floats that they are.
    static void set_codes(CodeRows &rows, Matrix &floats, size_t first, float mean, Random &random) {
        const float own = 0.02f * std::exp2(2 * random.normal());
        rows.set_scale(first / rows.dim, own);
        for (size_t i = 0; i < rows.dim; ++i) {
            const float wanted = std::round((mean + random.normal()) * 0.02f / own * 50);
            const int code = static_cast<int>(std::fmin(std::fmax(wanted, -127.0f), 127.0f));
            rows.set(first + i, code);
            floats.set(first + i, own * static_cast<float>(code));
        }
    }

    // Keys and values of the window up to the position, NaNs around.
    krasis_cuda_attention_args args(int64_t at) {
        Random random(static_cast<uint64_t>(at + 17));
        keys.bytes.poison();
        values.bytes.poison();
        key_codes.bytes.poison();
        value_codes.bytes.poison();
        out.bytes.poison();
        workspace.poison();
        for (int64_t h = 0; h < c.num_kv_heads; ++h) {
            for (int64_t key = first_key(at); key <= at; ++key) {
                if (c.codes) {
                    set_codes(key_codes, keys, cell(h, key), 0, random);
                    set_codes(value_codes, values, cell(h, key), static_cast<float>(h), random);
                    continue;
                }
                for (size_t i = 0; i < count(c.head_dim); ++i) {
                    keys.set(cell(h, key) + i, random.normal());
                    values.set(cell(h, key) + i, random.normal() + static_cast<float>(h));
                }
            }
        }
        position[0] = at;
        krasis_cuda_attention_args a{};
        a.q = q.bytes.upload();
        a.k_cache = key_memory().upload();
        a.v_cache = value_memory().upload();
        a.kv_dtype = c.codes ? KRASIS_I8 : 0;
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
        a.num_rows = 1;
        a.window = c.window;
        a.ring = c.ring;
        a.sinks = c.with_sinks ? sinks.upload() : nullptr;
        return a;
    }

    void check(int64_t at) const {
        for (int64_t h = 0; h < c.num_heads; ++h) {
            const int64_t kv = h / (c.num_heads / c.num_kv_heads);
            std::vector<double> weights;
            double highest = c.with_sinks ? sinks[count(h)] : -INFINITY;
            for (int64_t key = first_key(at); key <= at; ++key) {
                double score = 0;
                for (size_t i = 0; i < count(c.head_dim); ++i) {
                    score += q.get(count(h * c.head_dim) + i) * keys.get(cell(kv, key) + i);
                }
                weights.push_back(score * scale);
                highest = std::fmax(highest, weights.back());
            }
            double total = c.with_sinks ? std::exp(sinks[count(h)] - highest) : 0;
            for (double &w : weights) total += w = std::exp(w - highest);
            for (size_t i = 0; i < count(c.head_dim); ++i) {
                double value = 0, size = 0;
                for (int64_t key = first_key(at); key <= at; ++key) {
                    const double term = weights[count(key - first_key(at))] / total * values.get(cell(kv, key) + i);
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
        {3, 3, 128, 200, KRASIS_F16},  {20, 1, 64, 150, KRASIS_BF16},       {16, 1, 80, 150, KRASIS_F16},
        {6, 2, 96, 150, KRASIS_BF16},  {8, 1, 256, 300, KRASIS_BF16},       {34, 2, 208, 100, KRASIS_F16},
        {4, 2, 16, 100, KRASIS_BF16},  {8, 2, 128, 400, KRASIS_F16, 12.0f}, {8, 2, 256, 200, KRASIS_BF16, 12.0f},
        {8, 2, 512, 200, KRASIS_BF16}, {18, 1, 400, 130, KRASIS_F16}};
    for (const Case &c : cases) {
        Problem problem(c);
        problem.run(c.capacity - 1);
        problem.run(c.capacity / 3);
    }
}

// Windows and sinks, with one split and with several; a window that begins inside a stage, or before the first key.
void check_windows() {
    Problem small({4, 2, 64, 300, KRASIS_BF16, 1, 50, true});
    for (int64_t at : {0, 49, 50, 131, 299}) small.run(at);
    Problem many({8, 2, 128, 1000, KRASIS_F16, 1, 700, true});
    for (int64_t at : {600, 701, 999}) many.run(at);
    Problem sinks({3, 1, 64, 400, KRASIS_F16, 3, 0, true});
    for (int64_t at : {5, 399}) sinks.run(at);
}

// Rings: the window before, over and behind their end, one and several splits, a ring that is all window; the bits are
// those of a cache of all positions.
void check_rings() {
    const Case cases[] = {{4, 2, 64, 2000, KRASIS_BF16, 1, 50, true, false, 64},
                          {8, 2, 128, 3000, KRASIS_F16, 1, 700, true, false, 768},
                          {6, 2, 256, 900, KRASIS_BF16, 1, 77, false, true, 192},
                          {3, 1, 80, 700, KRASIS_F16, 2, 128, true, true, 128},
                          {4, 2, 400, 400, KRASIS_F16, 1, 30, false, false, 64}};
    for (const Case &c : cases) {
        Problem problem(c);
        Case whole = c;
        whole.ring = 0;
        Problem other(whole);
        for (int64_t at : {int64_t{0}, c.ring - 1, c.ring, c.ring + 1, c.ring + c.window / 2, c.capacity - 1}) {
            problem.run(at);
            other.run(at);
            CHECK(std::memcmp(problem.out.bytes.data(), other.out.bytes.data(), problem.out.bytes.size()) == 0);
        }
    }
    Problem problem(cases[0]);
    auto args = problem.args(100);
    args.window = 65;
    CHECK(krasis_cuda_attention_decode(&args, nullptr) == KRASIS_ERR_RANGE);
    args.window = 0;
    CHECK(krasis_cuda_attention_decode(&args, nullptr) == KRASIS_ERR_ARGUMENT);
    args.window = 50;
    args.ring = -1;
    CHECK(krasis_cuda_attention_decode(&args, nullptr) == KRASIS_ERR_ARGUMENT);
}

// Several rows, each with its own cache and position: each has the bits of its own call; one belongs to nobody.
void check_rows(bool codes, int64_t ring) {
    constexpr int64_t kPositions[] = {299, 0, 130, -1, 64};
    constexpr size_t kRows = 5, kOffset = 256, kOutStride = 4 * 80 + 8, kQStride = 6 * 80;
    const Case c{4, 1, 80, 300, KRASIS_BF16, 1, 200, true, codes, ring};
    Problem problem(c);
    const size_t row_bytes = 4 * 80 * 2;
    const size_t slot = problem.key_memory().size() + kOffset;
    Array<uint8_t> q(kRows * kQStride * 2), keys(kRows * slot), values(kRows * slot), out(kRows * kOutStride * 2);
    Array<uint8_t> workspace(
        static_cast<size_t>(krasis_cuda_attention_workspace_bytes(kRows, c.num_heads, c.head_dim, c.capacity)));
    out.poison();
    workspace.poison();
    std::vector<std::vector<uint8_t>> expected;
    Array<krasis_cuda_row> rows(kRows);
    for (size_t r = 0; r < kRows; ++r) {
        const int64_t at = kPositions[r];
        const auto args = problem.args(at < 0 ? 7 : at);
        CHECK_OK(krasis_cuda_attention_decode(&args, nullptr));
        problem.out.bytes.download();
        expected.emplace_back(problem.out.bytes.data(), problem.out.bytes.data() + row_bytes);
        std::memcpy(q.data() + r * kQStride * 2, problem.q.bytes.data(), row_bytes);
        std::memcpy(keys.data() + r * slot + kOffset, problem.key_memory().data(), slot - kOffset);
        std::memcpy(values.data() + r * slot + kOffset, problem.value_memory().data(), slot - kOffset);
    }
    auto args = problem.args(0);
    uint8_t *key_slots = keys.upload(), *value_slots = values.upload();
    for (size_t r = 0; r < kRows; ++r) rows[r] = {kPositions[r], key_slots + r * slot, value_slots + r * slot};
    args.q = q.upload();
    args.k_cache = args.v_cache = nullptr;
    args.position = nullptr;
    args.out = out.upload();
    args.workspace = workspace.upload();
    args.workspace_bytes = static_cast<int64_t>(workspace.size());
    args.num_rows = kRows;
    args.rows = rows.upload();
    args.keys_offset = args.values_offset = kOffset;
    args.q_stride = kQStride;
    args.out_stride = kOutStride;
    CHECK_OK(krasis_cuda_attention_decode(&args, nullptr));
    out.download();
    for (size_t r = 0; r < kRows; ++r) {
        const uint8_t *got = out.data() + r * kOutStride * 2;
        if (kPositions[r] >= 0) CHECK(std::memcmp(got, expected[r].data(), row_bytes) == 0);
        if (kPositions[r] < 0) CHECK(got[0] == 0xff && got[row_bytes - 1] == 0xff);
        CHECK(got[row_bytes] == 0xff);  // between the rows
    }
}

// Keys and values of 8 bits: every tile, rows of chunks of all sizes, several splits, windows that begin at odd keys.
void check_codes() {
    const Case cases[] = {
        {8, 2, 128, 200, KRASIS_BF16, 1, 0, false, true},  {4, 2, 64, 300, KRASIS_F16, 2, 101, true, true},
        {3, 1, 16, 130, KRASIS_BF16, 1, 0, true, true},    {20, 1, 80, 150, KRASIS_F16, 1, 0, false, true},
        {6, 2, 256, 200, KRASIS_BF16, 1, 77, false, true}, {34, 2, 208, 70, KRASIS_F16, 1, 0, false, true},
        {18, 1, 512, 140, KRASIS_BF16, 1, 0, false, true}, {4, 2, 400, 130, KRASIS_F16, 1, 50, true, true}};
    for (const Case &c : cases) {
        Problem problem(c);
        for (int64_t at : {c.capacity - 1, c.capacity / 3, int64_t{0}}) problem.run(at);
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
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.num_rows = 2; });  // without rows
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.window = -1; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.kv_dtype = 4; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.q_stride = 12; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.head_dim = 72; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.head_dim = 528; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.num_heads = 5; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.workspace_bytes -= 4; });
    CHECK(krasis_cuda_attention_decode(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_attention_workspace_bytes(1, 0, 64, 70) == 0);
}

#if !KRASIS_SIMT_DEVICE
void check_races(bool codes) {
    namespace simt = krasis::simt;
    Problem problem({4, 1, 64, 17000, KRASIS_BF16, 1, 0, false, codes});  // splits of five stages
    const auto args = problem.args(16999);
    for (const simt::Fault fault : {simt::Fault::kNoWait, simt::Fault::kWaitOneLess, simt::Fault::kNoBarrier}) {
        for (unsigned from = codes ? 2 : 0; from < (codes ? 3 : 4); ++from) {
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
    check_windows();
    check_codes();
    check_rings();
    for (bool codes : {false, true}) check_rows(codes, 0);
    check_rows(true, 256);
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    for (bool codes : {false, true}) check_races(codes);
#endif
}

}  // namespace test
