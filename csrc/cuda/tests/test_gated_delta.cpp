// test_gated_delta.cpp: the gated delta rule, and gated rows, against float64, token after token.
#include <cmath>
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Form {
    size_t key_heads, value_heads, key_dim, value_dim, width;
    int32_t dtype, gate;
    bool by_channel = false;
    float lower_bound = 0;
    size_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    size_t values() const { return value_heads * value_dim; }
    size_t columns() const { return channels() + (by_channel ? 0 : values()); }
    size_t biases() const { return value_heads * (by_channel ? key_dim : 1); }
    // Of a row: b and a of the heads; by channel b, a of their channels, and z.
    size_t gates() const { return value_heads + biases() + (by_channel ? values() : 0); }
};

// A sequence as the formulas have it: S [value_heads, key_dim, value_dim], and the rows so far.
struct Sequence {
    std::vector<double> matrices;
    std::vector<std::vector<double>> rows;
};

// Weights, and one call's rows, on the device. The reference sees the rounded x.
struct Problem {
    Form f;
    Array<float> conv, a_log, dt_bias, gate_norm;
    Random random;

    explicit Problem(const Form &form)
        : f(form),
          conv(f.channels() * f.width),
          a_log(f.value_heads),
          dt_bias(f.biases()),
          gate_norm(f.value_dim),
          random(form.key_dim * 64 + form.value_dim) {
        for (size_t i = 0; i < conv.size(); ++i) conv[i] = random.normal();
        for (size_t i = 0; i < f.value_heads; ++i) {
            a_log[i] = random.normal();
            if (!f.by_channel) dt_bias[i] = random.normal() - 2;
        }
        for (size_t i = 0; f.by_channel && i < f.biases(); ++i) dt_bias[i] = random.normal() - 2;
        for (size_t i = 0; i < f.value_dim; ++i) gate_norm[i] = 1 + 0.2f * random.normal();
    }

    krasis_cuda_gated_delta_args args() {
        krasis_cuda_gated_delta_args a{};
        a.key_heads = static_cast<int64_t>(f.key_heads);
        a.value_heads = static_cast<int64_t>(f.value_heads);
        a.key_dim = static_cast<int64_t>(f.key_dim);
        a.value_dim = static_cast<int64_t>(f.value_dim);
        a.conv_width = static_cast<int64_t>(f.width);
        a.conv = conv.upload();
        a.a_log = a_log.upload();
        a.dt_bias = dt_bias.upload();
        a.gate_norm = gate_norm.upload();
        a.norm_dtype = KRASIS_F32;
        a.dtype = f.dtype;
        a.gate = f.gate;
        a.eps = 1e-6f;
        a.lower_bound = f.lower_bound;
        return a;
    }

    // How much of a matrix's row stays. gates: of the token.
    double decay(size_t head, size_t i, const float *gates) const {
        const size_t at = f.by_channel ? head * f.key_dim + i : head;
        const double a = double{gates[f.value_heads + at]} + dt_bias[at], rate = std::exp(double{a_log[head]});
        return std::exp(f.lower_bound != 0 ? f.lower_bound * sigmoid(rate * a) : -rate * std::log1p(std::exp(a)));
    }

    // silu of the convolution of the newest row of a sequence.
    double mixed(const Sequence &s, size_t channel) const {
        double sum = 0;
        for (size_t j = 0; j < f.width; ++j) {
            const size_t back = f.width - 1 - j;
            if (back < s.rows.size()) sum += conv[channel * f.width + j] * s.rows[s.rows.size() - 1 - back][channel];
        }
        return sum * sigmoid(sum);
    }

    std::vector<double> unit(const Sequence &s, size_t channel, double factor) const {
        std::vector<double> values(f.key_dim);
        double squares = 1e-6;
        for (size_t i = 0; i < f.key_dim; ++i) {
            values[i] = mixed(s, channel + i);
            squares += values[i] * values[i];
        }
        for (double &value : values) value *= factor / std::sqrt(squares);
        return values;
    }

    // One token: gates are [b, a] of all heads. Returns [value_heads, value_dim].
    std::vector<double> step(Sequence &s, const std::vector<double> &x, const float *gates) const {
        s.rows.push_back(x);
        if (s.matrices.empty()) s.matrices.assign(f.value_heads * f.key_dim * f.value_dim, 0.0);
        std::vector<double> out(f.values());
        for (size_t head = 0; head < f.value_heads; ++head) {
            const size_t key_head = head / (f.value_heads / f.key_heads), keys = f.key_heads * f.key_dim;
            const auto q = unit(s, key_head * f.key_dim, 1 / std::sqrt(static_cast<double>(f.key_dim)));
            const auto k = unit(s, keys + key_head * f.key_dim, 1);
            const double beta = sigmoid(gates[head]);
            std::vector<double> kept(f.key_dim);
            for (size_t i = 0; i < f.key_dim; ++i) kept[i] = decay(head, i, gates);
            double *matrix = s.matrices.data() + head * f.key_dim * f.value_dim, square = 0;
            double *o = out.data() + head * f.value_dim;
            for (size_t c = 0; c < f.value_dim; ++c) {
                double known = 0;
                for (size_t i = 0; i < f.key_dim; ++i) {
                    matrix[i * f.value_dim + c] *= kept[i];
                    known += matrix[i * f.value_dim + c] * k[i];
                }
                const double delta = beta * (mixed(s, 2 * keys + head * f.value_dim + c) - known);
                for (size_t i = 0; i < f.key_dim; ++i) {
                    double &cell = matrix[i * f.value_dim + c];
                    cell += k[i] * delta;
                    o[c] += q[i] * cell;
                }
                square += o[c] * o[c];
            }
            const double rms = std::sqrt(square / static_cast<double>(f.value_dim) + 1e-6);
            for (size_t c = 0; c < f.value_dim; ++c) {
                const size_t at = head * f.value_dim + c;
                const double z = f.by_channel ? gates[f.value_heads + f.biases() + at] : x[f.channels() + at];
                o[c] *= gate_norm[c] / rms * sigmoid(z) * (f.gate == KRASIS_CUDA_GATE_SILU ? z : 1);
            }
        }
        return out;
    }
};

// The device's rows of a call, and what comes out.
struct Rows {
    Matrix x, mixed, out;
    Array<float> gates, decays, z;
    std::vector<float> raw;  // as Form::gates has them

    Rows(Problem &problem, size_t count)
        : x(count * problem.f.columns(), problem.f.dtype),
          mixed(count * problem.f.channels(), problem.f.dtype),
          out(count * problem.f.values() + 1, problem.f.dtype),
          gates(count * (problem.f.by_channel ? 1 : 2) * problem.f.value_heads),
          decays(problem.f.by_channel ? count * problem.f.biases() : 0),
          z(problem.f.by_channel ? count * problem.f.values() : 0) {
        for (size_t i = 0; i < count * problem.f.columns(); ++i) x.set(i, problem.random.normal());
        for (Array<float> *part : {&gates, &decays, &z}) {
            for (size_t i = 0; i < part->size(); ++i) (*part)[i] = problem.random.normal();
        }
        for (size_t r = 0; r < count; ++r) {
            for (Array<float> *part : {&gates, &decays, &z}) {
                const size_t width = part->size() / count;
                raw.insert(raw.end(), part->data() + r * width, part->data() + (r + 1) * width);
            }
        }
    }

    void put(krasis_cuda_gated_delta_args &a, size_t count) {
        a.x = x.bytes.upload();
        a.mixed = mixed.bytes.upload();
        a.out = out.bytes.upload();
        a.gates = gates.upload();
        a.decays = decays.size() > 0 ? decays.upload() : nullptr;
        a.z = z.size() > 0 ? z.upload() : nullptr;
        a.tokens = static_cast<int64_t>(count);
    }
    std::vector<double> row(const Form &f, size_t r) const {
        std::vector<double> values(f.columns());
        for (size_t i = 0; i < values.size(); ++i) values[i] = x.get(r * values.size() + i);
        return values;
    }
    // The device's row against the formulas'; how far apart they are, relative to the row.
    void compare(size_t r, const std::vector<double> &expected, double limit) {
        double apart = 0, size = 0;
        for (size_t i = 0; i < expected.size(); ++i) {
            const double found = out.get(r * expected.size() + i);
            apart += (found - expected[i]) * (found - expected[i]);
            size += expected[i] * expected[i];
            CHECK(!std::isnan(found));
        }
        CHECK(std::sqrt(apart) <= limit * std::sqrt(size) + 1e-9);
        CHECK(std::isnan(out.get(out.bytes.size() / 2 - 1)));
    }
};

// Of the state; a row may have more, where what it reads is little beside what is there.
double limit_of(const Form &f) { return f.dtype == KRASIS_BF16 ? 1.2e-2 : 1.5e-3; }

void compare_state(const Form &f, const float *matrices, const float *columns, const Sequence &s) {
    const size_t tiles = f.value_dim / 16;
    double apart = 0, size = 0;
    for (size_t head = 0; head < f.value_heads; ++head) {
        for (size_t i = 0; i < f.key_dim; ++i) {
            for (size_t c = 0; c < f.value_dim; ++c) {
                const double expected = s.matrices[(head * f.key_dim + i) * f.value_dim + c];
                const double found = matrices[((head * tiles + c / 16) * f.key_dim + i) * 16 + c % 16];
                apart += (found - expected) * (found - expected);
                size += expected * expected;
            }
        }
    }
    CHECK(std::sqrt(apart) <= limit_of(f) * std::sqrt(size));
    for (size_t j = 0; j + 1 < f.width; ++j) {
        const size_t back = f.width - 1 - j;
        for (size_t c = 0; c < f.channels(); ++c) {
            const double expected = back <= s.rows.size() ? s.rows[s.rows.size() - back][c] : 0.0;
            CHECK(columns[j * f.channels() + c] == static_cast<float>(expected));
        }
    }
}

// Calls of so many rows each of one sequence; its state begins as NaNs.
void check_calls(const Form &f, const std::vector<size_t> &counts) {
    Problem problem(f);
    Array<float> matrices(f.value_heads * f.key_dim * f.value_dim), columns((f.width - 1) * f.channels() + 4);
    matrices.poison();
    columns.poison();
    auto args = problem.args();
    args.matrices = matrices.upload();
    args.columns = columns.upload();
    constexpr size_t kChunks = 2;
    Array<uint8_t> chunks(kChunks * f.value_heads * KRASIS_CUDA_DELTA_CHUNK_BYTES + 1);
    chunks.poison();
    args.chunks = chunks.upload();
    args.num_chunks = kChunks;
    Sequence sequence;
    for (size_t count : counts) {
        Rows rows(problem, count);
        args.start = static_cast<int64_t>(sequence.rows.size());
        rows.put(args, count);
        CHECK_OK(krasis_cuda_gated_delta(&args, nullptr));
        rows.out.bytes.download();
        for (size_t r = 0; r < count; ++r) {
            const auto expected = problem.step(sequence, rows.row(f, r), rows.raw.data() + r * f.gates());
            rows.compare(r, expected, 4 * limit_of(f));
        }
    }
    matrices.download();
    columns.download();
    compare_state(f, matrices.data(), columns.data(), sequence);
    CHECK(std::isnan(columns[(f.width - 1) * f.channels()]));
    chunks.download();
    CHECK(chunks[chunks.size() - 1] == 0xff);
}

// Rows of several sequences by a table, of which one belongs to nobody and one begins.
void check_table(const Form &f) {
    constexpr size_t kSlots = 3, kSteps = 3;
    Problem problem(f);
    const size_t matrices = f.value_heads * f.key_dim * f.value_dim, columns = (f.width - 1) * f.channels();
    const size_t offset = 8, slot = offset + matrices + columns;
    Array<float> memory(kSlots * slot);
    memory.poison();
    float *base = memory.upload();
    Array<krasis_cuda_row> table(kSlots);
    auto args = problem.args();
    args.matrices_offset = static_cast<int64_t>(offset * sizeof(float));
    args.columns_offset = static_cast<int64_t>((offset + matrices) * sizeof(float));
    std::vector<Sequence> sequences(kSlots);
    for (size_t step = 0; step < kSteps; ++step) {
        Rows rows(problem, kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            const size_t s = (r + step) % kSlots;  // in any order
            const auto position = s == 1 && step == 0 ? int64_t{-1} : static_cast<int64_t>(sequences[s].rows.size());
            table[r] = {position, base + s * slot, nullptr};
        }
        args.rows = table.upload();
        rows.put(args, kSlots);
        CHECK_OK(krasis_cuda_gated_delta(&args, nullptr));
        rows.out.bytes.download();
        for (size_t r = 0; r < kSlots; ++r) {
            if (table[r].position < 0) {
                CHECK(std::isnan(rows.out.get(r * f.values())));
                continue;
            }
            const auto expected =
                problem.step(sequences[(r + step) % kSlots], rows.row(f, r), rows.raw.data() + r * f.gates());
            rows.compare(r, expected, 4 * limit_of(f));
        }
    }
    memory.download();
    for (size_t s = 0; s < kSlots; ++s) {
        const float *own = memory.data() + s * slot + offset;
        compare_state(f, own, own + matrices, sequences[s]);
        CHECK(std::isnan(memory[s * slot]));
    }
}

void check_refusals() {
    const Form f{1, 2, 16, 16, 4, KRASIS_BF16, KRASIS_CUDA_GATE_SILU};
    Problem problem(f);
    Rows rows(problem, 1);
    Array<float> state(4096);
    auto args = problem.args();
    rows.put(args, 1);
    args.matrices = args.columns = state.upload();
    CHECK(krasis_cuda_gated_delta(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    const auto status_of = [&](auto change) {
        auto wrong = args;
        change(wrong);
        return krasis_cuda_gated_delta(&wrong, nullptr);
    };
    CHECK(status_of([](auto &a) { a.dtype = KRASIS_F32; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.gate = 2; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.columns = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.start = -1; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.key_dim = 144; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.value_dim = 24; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.key_heads = 3; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.conv_width = 9; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.matrices += 1; }) == KRASIS_ERR_SHAPE);
    CHECK(status_of([](auto &a) { a.decays = a.gates; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status_of([](auto &a) { a.tokens = 0; }) == KRASIS_OK);
}

void check_gate_rows(int32_t dtype) {
    constexpr size_t kCount = 3 * 264;
    Random random(7);
    Matrix x(kCount + 1, dtype), gates(kCount, dtype);
    std::vector<double> before(kCount);
    for (size_t i = 0; i < kCount; ++i) {
        x.set(i, random.normal());
        before[i] = x.get(i);
        gates.set(i, 3 * random.normal());
    }
    krasis_cuda_gate_rows_args args{};
    args.x = x.bytes.upload();
    args.gates = gates.bytes.upload();
    args.count = kCount;
    args.dtype = dtype;
    CHECK_OK(krasis_cuda_gate_rows(&args, nullptr));
    x.bytes.download();
    for (size_t i = 0; i < kCount; ++i) {
        const double expected = before[i] * sigmoid(gates.get(i));
        CHECK(std::fabs(x.get(i) - expected) <= (x.rounding() + 4e-6) * std::fabs(expected) + 1e-7);
    }
    CHECK(std::isnan(x.get(kCount)));
    args.count = kCount - 4;
    CHECK(krasis_cuda_gate_rows(&args, nullptr) == KRASIS_ERR_SHAPE);
}

}  // namespace

void run_gated_delta() {
    const Form small{1, 2, 16, 32, 4, KRASIS_F16, KRASIS_CUDA_GATE_SILU};
    const Form wide{2, 4, 128, 128, 4, KRASIS_BF16, KRASIS_CUDA_GATE_SIGMOID};
    const Form odd{2, 2, 48, 80, 8, KRASIS_F16, KRASIS_CUDA_GATE_SILU};
    const Form plain{1, 1, 32, 16, 1, KRASIS_BF16, KRASIS_CUDA_GATE_SILU};
    const Form channels{2, 2, 64, 64, 4, KRASIS_F16, KRASIS_CUDA_GATE_SIGMOID, true};
    const Form bounded{1, 2, 48, 16, 4, KRASIS_BF16, KRASIS_CUDA_GATE_SIGMOID, true, -5.0f};
    check_calls(channels, {1, 20, 2});
    check_calls(bounded, {17, 1});
    check_table(channels);
    check_table(bounded);
    check_calls(small, {1, 2, 1, 9, 3});
    check_calls(wide, {5, 1});
    check_calls(odd, {3, 10, 1, 1});
    check_calls(plain, {2, 1});
    check_calls(small, {16, 64, 3, 130, 1});
    check_calls(wide, {70, 2, 192});
    check_calls(odd, {17, 65});
    check_calls(plain, {65});
    check_table(small);
    check_table(wide);
    check_refusals();
    for (int32_t dtype : kDtypes) check_gate_rows(dtype);
}

}  // namespace test
