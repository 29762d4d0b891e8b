// test_mamba.cpp: Mamba-2 against float64, row after row.
#include <cmath>
#include <cstring>
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

struct Sizes {
    size_t heads, head_dim, state_dim, groups, width, more_columns;  // of x, which nobody reads
    int32_t dtype;
    bool has_bias;

    size_t inner() const { return heads * head_dim; }
    size_t channels() const { return inner() + 2 * groups * state_dim; }
    size_t columns() const { return inner() + channels() + more_columns; }
    size_t matrices() const { return inner() * state_dim; }
    size_t kept() const { return (width - 1) * channels(); }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A sequence's state in float64.
struct State {
    std::vector<std::vector<double>> past;  // rows before the convolution
    std::vector<double> matrices;           // [heads, state_dim, head_dim]
};

struct Problem {
    Sizes s;
    Array<float> conv, bias, a_log, dt_bias, skip, norm;
    Random random;
    float min_step = 0.3f, eps = 1e-5f;

    explicit Problem(const Sizes &z)
        : s(z),
          conv(z.channels() * z.width),
          bias(z.channels()),
          a_log(z.heads),
          dt_bias(z.heads),
          skip(z.heads),
          norm(z.inner()),
          random(z.inner()) {
        for (auto *one : {&conv, &bias, &a_log, &dt_bias, &skip, &norm}) {
            for (size_t i = 0; i < one->size(); ++i) (*one)[i] = 0.5f * random.normal();
        }
    }

    krasis_cuda_mamba2_args args() {
        krasis_cuda_mamba2_args a{};
        a.ldx = static_cast<int64_t>(s.columns());
        a.heads = static_cast<int64_t>(s.heads);
        a.head_dim = static_cast<int64_t>(s.head_dim);
        a.state_dim = static_cast<int64_t>(s.state_dim);
        a.groups = static_cast<int64_t>(s.groups);
        a.conv_width = static_cast<int64_t>(s.width);
        a.conv = conv.upload();
        a.conv_bias = s.has_bias ? bias.upload() : nullptr;
        a.a_log = a_log.upload();
        a.dt_bias = dt_bias.upload();
        a.skip = skip.upload();
        a.gate_norm = norm.upload();
        a.norm_dtype = KRASIS_F32;
        a.dtype = s.dtype;
        a.eps = eps;
        a.min_step = min_step;
        return a;
    }

    std::vector<double> convolved(State &state, const Matrix &x, size_t row) const {
        std::vector<double> now(s.channels()), out(s.channels());
        for (size_t c = 0; c < s.channels(); ++c) now[c] = x.get(row * s.columns() + s.inner() + c);
        state.past.push_back(now);
        for (size_t c = 0; c < s.channels(); ++c) {
            double sum = s.has_bias ? bias[c] : 0.0;
            for (size_t j = 0; j < s.width && j < state.past.size(); ++j) {
                sum += conv[c * s.width + s.width - 1 - j] * state.past[state.past.size() - 1 - j][c];
            }
            out[c] = sum * sigmoid(sum);
        }
        return out;
    }

    // One row of x more: what comes out of it.
    std::vector<double> step(State &state, const Matrix &x, const std::vector<float> &steps, size_t row) const {
        const std::vector<double> mixed = convolved(state, x, row);
        state.matrices.resize(s.matrices());
        std::vector<double> out(s.inner());
        for (size_t h = 0; h < s.heads; ++h) {
            const double raw = steps[row * s.heads + h] + static_cast<double>(dt_bias[h]);
            const double dt = std::fmax(min_step, std::log1p(std::exp(raw)));
            const double kept = std::exp(-std::exp(static_cast<double>(a_log[h])) * dt);
            const double *b = mixed.data() + s.inner() + h / (s.heads / s.groups) * s.state_dim;
            const double *c = b + s.groups * s.state_dim, *u = mixed.data() + h * s.head_dim;
            double *matrix = state.matrices.data() + h * s.state_dim * s.head_dim;
            for (size_t i = 0; i < s.head_dim; ++i) {
                double sum = skip[h] * u[i];
                for (size_t n = 0; n < s.state_dim; ++n) {
                    double &cell = matrix[n * s.head_dim + i];
                    cell = kept * cell + b[n] * dt * u[i];
                    sum += c[n] * cell;
                }
                const double z = x.get(row * s.columns() + h * s.head_dim + i);
                out[h * s.head_dim + i] = sum * z * sigmoid(z);
            }
        }
        const size_t width = s.inner() / s.groups;
        for (size_t first = 0; first < s.inner(); first += width) {
            double square = 0;
            for (size_t i = first; i < first + width; ++i) square += out[i] * out[i];
            const double scale = 1 / std::sqrt(square / static_cast<double>(width) + eps);
            for (size_t i = first; i < first + width; ++i) out[i] *= scale * norm[i];
        }
        return out;
    }

    void compare_state(const float *matrices, const float *columns, const State &state) const {
        for (size_t j = 0; j + 1 < s.width; ++j) {
            const size_t back = s.width - 1 - j;
            for (size_t c = 0; c < s.channels(); ++c) {
                const double expected = back <= state.past.size() ? state.past[state.past.size() - back][c] : 0.0;
                CHECK(columns[j * s.channels() + c] == static_cast<float>(expected));
            }
        }
        double most = 0, error = 0;
        for (size_t h = 0; h < s.heads; ++h) {
            for (size_t i = 0; i < s.head_dim; ++i) {
                for (size_t n = 0; n < s.state_dim; ++n) {
                    const size_t tile = h * (s.head_dim / 16) + i / 16;
                    const double expected = state.matrices[(h * s.state_dim + n) * s.head_dim + i];
                    most = std::fmax(most, std::fabs(expected));
                    const double difference = matrices[(tile * s.state_dim + n) * 16 + i % 16] - expected;
                    CHECK(!std::isnan(difference));
                    error = std::fmax(error, std::fabs(difference));
                }
            }
        }
        CHECK(error <= (s.dtype == KRASIS_BF16 ? 2e-2 : 2e-3) * most);
    }
};

struct Rows {
    Matrix x, mixed, out;
    Array<float> steps, scanned;
    std::vector<float> given;

    Rows(Problem &problem, size_t count)
        : x(count * problem.s.columns(), problem.s.dtype),
          mixed(count * problem.s.channels() + 1, problem.s.dtype),
          out(count * problem.s.inner() + 1, problem.s.dtype),
          steps(count * problem.s.heads),
          scanned(count * problem.s.inner() + 1) {
        for (size_t i = 0; i < count * problem.s.columns(); ++i) x.set(i, problem.random.normal());
        for (size_t i = 0; i < steps.size(); ++i) given.push_back(steps[i] = problem.random.normal());
        scanned.poison();
    }

    void run(krasis_cuda_mamba2_args &a, size_t count) {
        a.x = x.bytes.upload();
        a.mixed = mixed.bytes.upload();
        a.out = out.bytes.upload();
        a.steps = steps.upload();
        a.scanned = scanned.upload();
        a.tokens = static_cast<int64_t>(count);
        CHECK_OK(krasis_cuda_mamba2(&a, nullptr));
        out.bytes.download();
        mixed.bytes.download();
        scanned.download();
        CHECK(std::isnan(out.get(out.bytes.size() / 2 - 1)));
        CHECK(std::isnan(mixed.get(mixed.bytes.size() / 2 - 1)));
        CHECK(std::isnan(scanned[scanned.size() - 1]));
    }

    // By the row's size: numbers in between are rounded to 16 bits.
    void compare(size_t row, const std::vector<double> &expected) {
        double square = 0, error = 0;
        for (size_t c = 0; c < expected.size(); ++c) {
            const double difference = out.get(row * expected.size() + c) - expected[c];
            error += difference * difference;
            square += expected[c] * expected[c];
        }
        CHECK(std::sqrt(error / square) <= 8 * out.rounding());
    }
};

// Calls of so many rows each of one sequence; its state begins as NaNs.
void check_calls(const Sizes &s, const std::vector<size_t> &counts) {
    Problem problem(s);
    Array<float> columns(s.kept() + 4), matrices(s.matrices() + 4);
    columns.poison();
    matrices.poison();
    auto args = problem.args();
    args.columns = columns.upload();
    args.matrices = matrices.upload();
    State state;
    for (size_t count : counts) {
        Rows rows(problem, count);
        args.start = static_cast<int64_t>(state.past.size());
        rows.run(args, count);
        for (size_t r = 0; r < count; ++r) rows.compare(r, problem.step(state, rows.x, rows.given, r));
    }
    columns.download();
    matrices.download();
    problem.compare_state(matrices.data(), columns.data(), state);
    CHECK(std::isnan(columns[s.kept()]));
    CHECK(std::isnan(matrices[s.matrices()]));
}

// Rows of several sequences by a table, of which one belongs to nobody and one begins.
void check_table(const Sizes &s) {
    constexpr size_t kSlots = 3, kSteps = 3, kOffset = 8;
    Problem problem(s);
    const size_t slot = kOffset + s.matrices() + s.kept();
    Array<float> memory(kSlots * slot);
    memory.poison();
    float *base = memory.upload();
    Array<krasis_cuda_row> table(kSlots);
    auto args = problem.args();
    args.matrices_offset = kOffset * sizeof(float);
    args.columns_offset = static_cast<int64_t>((kOffset + s.matrices()) * sizeof(float));
    std::vector<State> sequences(kSlots);
    for (size_t step = 0; step < kSteps; ++step) {
        Rows rows(problem, kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            const size_t i = (r + step) % kSlots;  // in any order
            const auto length = static_cast<int64_t>(sequences[i].past.size());
            table[r] = {i == 1 && step == 0 ? int64_t{-1} : length, base + i * slot, nullptr};
        }
        args.rows = table.upload();
        rows.run(args, kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            if (table[r].position < 0) {
                CHECK(std::isnan(rows.out.get(r * s.inner())));
            } else {
                rows.compare(r, problem.step(sequences[(r + step) % kSlots], rows.x, rows.given, r));
            }
        }
    }
    memory.download();
    for (size_t i = 0; i < kSlots; ++i) {
        const float *own = memory.data() + i * slot + kOffset;
        problem.compare_state(own, own + s.matrices(), sequences[i]);
        CHECK(std::isnan(memory[i * slot]));
    }
}

// The same bits however a sequence is cut.
void check_cuts(const Sizes &s) {
    constexpr size_t kRows = 21;
    Problem problem(s);
    Rows whole(problem, kRows);
    Array<float> columns(s.kept()), matrices(s.matrices());
    auto args = problem.args();
    args.columns = columns.upload();
    args.matrices = matrices.upload();
    whole.run(args, kRows);
    for (size_t cut : {size_t{1}, size_t{7}, size_t{20}}) {
        size_t first = 0;
        for (size_t count : {cut, kRows - cut}) {
            Rows part(problem, count);
            std::memcpy(part.x.bytes.data(), whole.x.bytes.data() + 2 * first * s.columns(), 2 * count * s.columns());
            std::memcpy(part.steps.data(), whole.given.data() + first * s.heads, count * s.heads * sizeof(float));
            args.start = static_cast<int64_t>(first);
            part.run(args, count);
            for (size_t i = 0; i < count * s.inner(); ++i) {
                CHECK(part.out.get(i) == whole.out.get(first * s.inner() + i));
            }
            first += count;
        }
    }
}

void check_refusals() {
    const Sizes s{2, 16, 16, 1, 4, 0, KRASIS_BF16, true};
    Problem problem(s);
    Rows rows(problem, 1);
    Array<float> columns(s.kept()), matrices(s.matrices());
    auto args = problem.args();
    args.columns = columns.upload();
    args.matrices = matrices.upload();
    rows.run(args, 1);
    CHECK(krasis_cuda_mamba2(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    const auto status_of = [&](auto change) {
        auto wrong = args;
        change(wrong);
        return krasis_cuda_mamba2(&wrong, nullptr);
    };
    CHECK(status_of([](auto &a) { a.dtype = KRASIS_F32; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.matrices = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.skip = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.start = -1; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.head_dim = 8; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.state_dim = 258; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.groups = 3; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.conv_width = 9; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.ldx -= 8; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.columns += 1; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.tokens = 0; }) == KRASIS_OK);
}

}  // namespace

void run_mamba() {
    check_calls({4, 64, 128, 2, 4, 0, KRASIS_BF16, true}, {1, 1, 21, 2});
    check_calls({10, 16, 64, 2, 4, 32, KRASIS_F16, true}, {3, 17, 1});
    check_calls({3, 32, 256, 1, 1, 0, KRASIS_F16, false}, {9, 1});
    check_table({6, 32, 48, 3, 4, 0, KRASIS_F16, true});
    check_cuts({4, 32, 96, 2, 4, 0, KRASIS_F16, true});
    check_refusals();
}

}  // namespace test
