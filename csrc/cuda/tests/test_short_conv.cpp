// test_short_conv.cpp: gated short convolutions against float64, row after row.
#include <cmath>
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

struct Sizes {
    size_t channels, width;
    int32_t dtype;
};

// The products b * x of a sequence's rows so far.
using Past = std::vector<std::vector<double>>;

struct Problem {
    Sizes s;
    Array<float> conv;
    Random random;

    explicit Problem(const Sizes &sizes) : s(sizes), conv(sizes.channels * sizes.width), random(sizes.channels) {
        for (size_t i = 0; i < conv.size(); ++i) conv[i] = random.normal();
    }

    krasis_cuda_short_conv_args args() {
        krasis_cuda_short_conv_args a{};
        a.channels = static_cast<int64_t>(s.channels);
        a.width = static_cast<int64_t>(s.width);
        a.conv = conv.upload();
        a.dtype = s.dtype;
        return a;
    }

    // One row of x more: what comes out of it.
    std::vector<double> step(Past &past, const Matrix &x, size_t row) const {
        std::vector<double> product(s.channels), out(s.channels);
        const size_t at = row * 3 * s.channels;
        for (size_t c = 0; c < s.channels; ++c) product[c] = x.get(at + c) * x.get(at + 2 * s.channels + c);
        past.push_back(product);
        for (size_t c = 0; c < s.channels; ++c) {
            double sum = 0;
            for (size_t j = 0; j < s.width && j < past.size(); ++j) {
                sum += conv[c * s.width + s.width - 1 - j] * past[past.size() - 1 - j][c];
            }
            out[c] = x.get(at + s.channels + c) * sum;
        }
        return out;
    }

    void compare_state(const float *columns, const Past &past) const {
        for (size_t j = 0; j + 1 < s.width; ++j) {
            const size_t back = s.width - 1 - j;
            for (size_t c = 0; c < s.channels; ++c) {
                const double expected = back <= past.size() ? past[past.size() - back][c] : 0.0;
                CHECK(columns[j * s.channels + c] == static_cast<float>(expected));
            }
        }
    }
};

struct Rows {
    Matrix x, out;

    Rows(Problem &problem, size_t count)
        : x(count * 3 * problem.s.channels, problem.s.dtype), out(count * problem.s.channels + 1, problem.s.dtype) {
        for (size_t i = 0; i < count * 3 * problem.s.channels; ++i) x.set(i, problem.random.normal());
    }

    void run(krasis_cuda_short_conv_args &a, size_t count) {
        a.x = x.bytes.upload();
        a.out = out.bytes.upload();
        a.tokens = static_cast<int64_t>(count);
        CHECK_OK(krasis_cuda_short_conv(&a, nullptr));
        out.bytes.download();
        CHECK(std::isnan(out.get(out.bytes.size() / 2 - 1)));
    }

    void compare(size_t row, const std::vector<double> &expected) {
        for (size_t c = 0; c < expected.size(); ++c) {
            const double found = out.get(row * expected.size() + c);
            CHECK(std::fabs(found - expected[c]) <= out.rounding() * std::fabs(expected[c]) + 2e-5);
        }
    }
};

// Calls of so many rows each of one sequence; its state begins as NaNs.
void check_calls(const Sizes &s, const std::vector<size_t> &counts) {
    Problem problem(s);
    Array<float> columns((s.width - 1) * s.channels + 4);
    columns.poison();
    auto args = problem.args();
    args.columns = columns.upload();
    Past past;
    for (size_t count : counts) {
        Rows rows(problem, count);
        args.start = static_cast<int64_t>(past.size());
        rows.run(args, count);
        for (size_t r = 0; r < count; ++r) rows.compare(r, problem.step(past, rows.x, r));
    }
    columns.download();
    problem.compare_state(columns.data(), past);
    CHECK(std::isnan(columns[(s.width - 1) * s.channels]));
}

// Rows of several sequences by a table, of which one belongs to nobody and one begins.
void check_table(const Sizes &s) {
    constexpr size_t kSlots = 3, kSteps = 3, kOffset = 8;
    Problem problem(s);
    const size_t slot = kOffset + (s.width - 1) * s.channels;
    Array<float> memory(kSlots * slot);
    memory.poison();
    float *base = memory.upload();
    Array<krasis_cuda_row> table(kSlots);
    auto args = problem.args();
    args.columns_offset = kOffset * sizeof(float);
    std::vector<Past> sequences(kSlots);
    for (size_t step = 0; step < kSteps; ++step) {
        Rows rows(problem, kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            const size_t i = (r + step) % kSlots;  // in any order
            const auto position = i == 1 && step == 0 ? int64_t{-1} : static_cast<int64_t>(sequences[i].size());
            table[r] = {position, base + i * slot, nullptr};
        }
        args.rows = table.upload();
        rows.run(args, kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            if (table[r].position < 0) {
                CHECK(std::isnan(rows.out.get(r * s.channels)));
            } else {
                rows.compare(r, problem.step(sequences[(r + step) % kSlots], rows.x, r));
            }
        }
    }
    memory.download();
    for (size_t i = 0; i < kSlots; ++i) {
        problem.compare_state(memory.data() + i * slot + kOffset, sequences[i]);
        CHECK(std::isnan(memory[i * slot]));
    }
}

void check_refusals() {
    Problem problem({16, 3, KRASIS_BF16});
    Rows rows(problem, 1);
    Array<float> columns(32);
    auto args = problem.args();
    args.columns = columns.upload();
    rows.run(args, 1);
    CHECK(krasis_cuda_short_conv(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    const auto status_of = [&](auto change) {
        auto wrong = args;
        change(wrong);
        return krasis_cuda_short_conv(&wrong, nullptr);
    };
    CHECK(status_of([](auto &a) { a.dtype = KRASIS_F32; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.columns = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.start = -1; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.channels = 12; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.width = 9; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.columns += 1; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.tokens = 0; }) == KRASIS_OK);
}

}  // namespace

void run_short_conv() {
    check_calls({320, 3, KRASIS_BF16}, {1, 1, 21, 2});
    check_calls({16, 8, KRASIS_F16}, {3, 17, 1});
    check_calls({8, 1, KRASIS_F16}, {9, 1});
    check_table({48, 3, KRASIS_F16});
    check_refusals();
}

}  // namespace test
