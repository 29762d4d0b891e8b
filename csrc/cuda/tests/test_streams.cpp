// test_streams.cpp: gated residual streams and hashed n-gram tables against float64.
#include <cmath>
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void fill(Array<float> &to, Random &random, float scale = 1) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = scale * random.normal();
}

bool is_near(double found, double expected, double limit) {
    return std::abs(found - expected) <= limit * (1 + std::abs(expected));
}

double inverse_rms(const float *x, size_t k, double eps) {
    double square = 0;
    for (size_t i = 0; i < k; ++i) square += static_cast<double>(x[i]) * x[i];
    return 1 / std::sqrt(square / static_cast<double>(k) + eps);
}

void check_streams(size_t tokens, size_t streams, size_t k) {
    Random random(tokens + k);
    const size_t wide = tokens * streams * k;
    const auto t64 = static_cast<int64_t>(tokens), s64 = static_cast<int64_t>(streams), k64 = static_cast<int64_t>(k);
    Array<float> x(wide), gates(wide), weight(streams * k), normed(wide), out(tokens * k), cleared(tokens * k);
    Array<float> added(tokens * k), logits(tokens * streams);
    Array<uint16_t> x16(tokens * k);
    for (auto *one : {&x, &gates, &weight, &added, &logits, &cleared}) fill(*one, random, 2);
    normed.poison();
    out.poison();
    krasis_cuda_stream_norm_args norm{x.upload(), weight.upload(), normed.upload(), t64, s64, k64, KRASIS_F32, 1e-2f};
    CHECK_OK(krasis_cuda_stream_norm(&norm, nullptr));
    krasis_cuda_stream_mix_args mix{norm.out,     gates.upload(),   t64,         s64, k64, out.upload(),
                                    x16.upload(), cleared.upload(), KRASIS_BF16, 0};
    CHECK_OK(krasis_cuda_stream_mix(&mix, nullptr));
    normed.download();
    out.download();
    x16.download();
    cleared.download();
    for (size_t t = 0; t < tokens; ++t) {
        for (size_t i = 0; i < k; ++i) {
            double sum = 0;
            for (size_t s = 0; s < streams; ++s) {
                const size_t at = (t * streams + s) * k;
                const double expected = x[at + i] * inverse_rms(&x[at], k, 1e-2) * weight[s * k + i];
                CHECK(is_near(normed[at + i], expected, 2e-6));
                sum += sigmoid(gates[at + i]) * expected / static_cast<double>(streams);
            }
            CHECK(is_near(out[t * k + i], sum, 4e-6));
            CHECK(is_near(krasis::bf16_to_float(x16[t * k + i]), sum, 5e-3));
            CHECK(cleared[t * k + i] == 0);
        }
    }
    Array<float> summed(wide), low(tokens * 16);
    for (size_t i = 0; i < wide; ++i) summed[i] = x[i];
    fill(low, random, 3);
    const std::vector<float> before(low.data(), low.data() + low.size());
    krasis_cuda_stream_add_args add{summed.upload(), added.upload(), logits.upload(), t64, s64, k64};
    CHECK_OK(krasis_cuda_stream_add(&add, nullptr));
    krasis_cuda_stream_squash_args squash{low.upload(), static_cast<int64_t>(low.size()), 0.25f, 0};
    CHECK_OK(krasis_cuda_stream_squash(&squash, nullptr));
    summed.download();
    low.download();
    for (size_t i = 0; i < wide; ++i) {
        const size_t row = i / k;
        const double share = 2 * sigmoid(static_cast<double>(logits[row]) / static_cast<double>(streams));
        CHECK(is_near(summed[i], x[i] + share * added[row / streams * k + i % k], 4e-6));
    }
    for (size_t i = 0; i < low.size(); ++i) CHECK(is_near(low[i], 0.25 * before[i] * sigmoid(0.25 * before[i]), 2e-6));
}

void check_weighing(size_t tokens, size_t streams, size_t k) {
    Random random(tokens + 3 * k);
    const size_t wide = tokens * streams * k;
    Array<float> x(wide), keys(wide), values(tokens * k), gated(wide), normed(wide);
    Array<float> key_norm(streams * k), query_norm(streams * k), conv_norm(streams * k);
    for (auto *one : {&x, &keys, &values, &key_norm, &query_norm, &conv_norm}) fill(*one, random);
    for (size_t i = 0; i < k; ++i) keys[i] = 0;  // a product of 0 opens half
    gated.poison();
    normed.poison();
    krasis_cuda_table_weigh_args args{x.upload(),
                                      keys.upload(),
                                      values.upload(),
                                      key_norm.upload(),
                                      query_norm.upload(),
                                      conv_norm.upload(),
                                      gated.upload(),
                                      normed.upload(),
                                      static_cast<int64_t>(tokens),
                                      static_cast<int64_t>(streams),
                                      static_cast<int64_t>(k),
                                      KRASIS_F32,
                                      1e-5f};
    CHECK_OK(krasis_cuda_table_weigh(&args, nullptr));
    gated.download();
    normed.download();
    for (size_t row = 0; row < tokens * streams; ++row) {
        const size_t at = row * k, own = row % streams * k, value = row / streams * k;
        double product = 0, square = 0;
        for (size_t i = 0; i < k; ++i)
            product += static_cast<double>(keys[at + i]) * key_norm[own + i] * x[at + i] * query_norm[own + i];
        product *= inverse_rms(&keys[at], k, 1e-5) * inverse_rms(&x[at], k, 1e-5) / std::sqrt(static_cast<double>(k));
        const double root = std::sqrt(std::max(std::abs(product), 1e-6));
        const double gate = sigmoid(product > 0 ? root : product < 0 ? -root : 0);
        for (size_t i = 0; i < k; ++i) square += gate * values[value + i] * gate * values[value + i];
        const double scale = 1 / std::sqrt(square / static_cast<double>(k) + 1e-5);
        for (size_t i = 0; i < k; ++i) {
            CHECK(is_near(gated[at + i], gate * values[value + i], 2e-5));
            CHECK(is_near(normed[at + i], gate * values[value + i] * scale * conv_norm[own + i], 4e-5));
        }
    }
}

// Sequences whose rows come in calls of their own, then one row of each at a time.
struct TableProblem {
    size_t channels, width, dilation;
    Array<float> conv;
    Random random;

    TableProblem(size_t num_channels, size_t taps, size_t step)
        : channels(num_channels), width(taps), dilation(step), conv(num_channels * taps), random(num_channels) {
        fill(conv, random);
    }
    size_t num_past() const { return (width - 1) * dilation; }

    using Rows = std::vector<std::vector<float>>;

    krasis_cuda_table_add_args args(size_t tokens) {
        krasis_cuda_table_add_args made{};
        made.conv = conv.upload();
        made.tokens = static_cast<int64_t>(tokens);
        made.channels = static_cast<int64_t>(channels);
        made.width = static_cast<int64_t>(width);
        made.dilation = static_cast<int64_t>(dilation);
        return made;
    }
    // What the last of a sequence's rows adds in a channel, beside what is gated.
    double added(const Rows &rows, size_t channel) const {
        double sum = 0;
        for (size_t j = 0; j < width; ++j) {
            const size_t back = (width - 1 - j) * dilation;
            if (back < rows.size())
                sum += static_cast<double>(conv[channel * width + j]) * rows[rows.size() - 1 - back][channel];
        }
        return sum * sigmoid(sum);
    }
    void check_past(const float *past, const Rows &rows) const {
        for (size_t j = 0; j < num_past(); ++j) {
            const size_t back = num_past() - j;
            for (size_t c = 0; c < channels; ++c)
                CHECK(past[j * channels + c] == (back <= rows.size() ? rows[rows.size() - back][c] : 0.0f));
        }
    }
};

struct TableCall {
    Array<float> x, gated, normed;
    std::vector<float> before;

    TableCall(TableProblem &problem, size_t tokens) : x(tokens * problem.channels), gated(x.size()), normed(x.size()) {
        for (auto *one : {&x, &gated, &normed}) fill(*one, problem.random);
        before.assign(x.data(), x.data() + x.size());
    }
    void run(krasis_cuda_table_add_args args) {
        args.x = x.upload();
        args.gated = gated.upload();
        args.normed = normed.upload();
        CHECK_OK(krasis_cuda_table_add(&args, nullptr));
        x.download();
    }
    void compare(const TableProblem &problem, TableProblem::Rows &rows, size_t row) {
        const float *own = normed.data() + row * problem.channels;
        rows.emplace_back(own, own + problem.channels);
        for (size_t c = 0; c < problem.channels; ++c) {
            const size_t at = row * problem.channels + c;
            CHECK(is_near(x[at], before[at] + gated[at] + problem.added(rows, c), 1e-5));
        }
    }
};

void check_table(size_t channels, size_t width, size_t dilation, const std::vector<size_t> &calls) {
    TableProblem problem(channels, width, dilation);
    TableProblem::Rows rows;
    Array<float> past(problem.num_past() * channels + 4);
    past.poison();
    float *address = past.upload();
    for (const size_t count : calls) {
        TableCall call(problem, count);
        auto args = problem.args(count);
        args.past = address;
        args.start = static_cast<int64_t>(rows.size());
        call.run(args);
        for (size_t r = 0; r < count; ++r) call.compare(problem, rows, r);
    }
    past.download();
    problem.check_past(past.data(), rows);
    CHECK(std::isnan(past[problem.num_past() * channels]));
}

void check_table_of_rows() {
    constexpr size_t kSlots = 3, kOffset = 8;
    TableProblem problem(24, 3, 2);
    const size_t slot = kOffset + problem.num_past() * problem.channels;
    Array<float> memory(kSlots * slot);
    memory.poison();
    auto *base = memory.upload();
    TableProblem::Rows sequences[kSlots];
    for (int step = 0; step < 6; ++step) {
        TableCall call(problem, kSlots);
        Array<krasis_cuda_row> table(kSlots);
        for (size_t r = 0; r < kSlots; ++r) {
            const size_t s = (r + static_cast<size_t>(step)) % kSlots;
            const bool nobody = s == 1 && step == 0;
            table[r] = {nobody ? int64_t{-1} : static_cast<int64_t>(sequences[s].size()), base + s * slot, nullptr};
        }
        auto args = problem.args(kSlots);
        args.rows = table.upload();
        args.past_offset = kOffset * sizeof(float);
        call.run(args);
        for (size_t r = 0; r < kSlots; ++r) {
            const size_t s = (r + static_cast<size_t>(step)) % kSlots;
            if (table[r].position >= 0) {
                call.compare(problem, sequences[s], r);
            } else {
                CHECK(call.x[r * problem.channels] == call.before[r * problem.channels]);
            }
        }
    }
    memory.download();
    for (size_t s = 0; s < kSlots; ++s) problem.check_past(memory.data() + s * slot + kOffset, sequences[s]);
}

void check_refusals() {
    Array<float> x(64);
    float *at = x.upload();
    krasis_cuda_stream_norm_args norm{at, at, at, 1, 2, 12, KRASIS_F32, 0};
    CHECK(krasis_cuda_stream_norm(&norm, nullptr) == KRASIS_ERR_SHAPE);
    norm.streams = 0;
    CHECK(krasis_cuda_stream_norm(&norm, nullptr) == KRASIS_ERR_ARGUMENT);
    krasis_cuda_stream_mix_args mix{at, at, 1, 2, 8, at, nullptr, nullptr, KRASIS_F16, 0};
    CHECK(krasis_cuda_stream_mix(&mix, nullptr) == KRASIS_ERR_ARGUMENT);
    krasis_cuda_stream_add_args add{at, at + 1, at, 1, 2, 8};
    CHECK(krasis_cuda_stream_add(&add, nullptr) == KRASIS_ERR_SHAPE);
    krasis_cuda_stream_squash_args squash{at, 7, 1, 0};
    CHECK(krasis_cuda_stream_squash(&squash, nullptr) == KRASIS_ERR_SHAPE);
    krasis_cuda_table_add_args table{at, at, at, at, 1, 8, 65, 1, at, 0, nullptr, 0};
    CHECK(krasis_cuda_table_add(&table, nullptr) == KRASIS_ERR_SHAPE);
    table.width = 2;
    table.past = nullptr;
    CHECK(krasis_cuda_table_add(&table, nullptr) == KRASIS_ERR_ARGUMENT);
    table.past = at;
    table.tokens = 0;
    CHECK(krasis_cuda_table_add(&table, nullptr) == KRASIS_OK);
    CHECK(krasis_cuda_table_weigh(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

}  // namespace

void run_streams() {
    check_streams(1, 4, 64);
    check_streams(5, 3, 24);
    check_streams(20, 4, 2056);
    check_weighing(3, 4, 64);
    check_weighing(2, 2, 2056);
    check_table(40, 4, 3, {1, 2, 17, 4});
    check_table(8, 1, 2, {3, 1});
    check_table(264, 2, 5, {2, 1, 1, 30});
    check_table_of_rows();
    check_refusals();
}

}  // namespace test
