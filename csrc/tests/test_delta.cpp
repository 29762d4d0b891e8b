// test_delta.cpp: rows of several sequences in one call of the gated delta rule, in buffers without a byte to spare:
// each sequence gets the bits of calls of its own, whatever the threads and the instruction set. Values are checked in
// Python.
#include <algorithm>
#include <limits>

#include "test.h"

namespace {

using test::Buffer;
using test::Pool;
using test::Random;

struct Sizes {
    int64_t key_heads, value_heads, key_dim, value_dim, conv_width;
    int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
    int64_t out() const { return value_heads * value_dim; }
    int64_t matrices() const { return value_heads * key_dim * value_dim; }
    int64_t state() const { return matrices() + (conv_width - 1) * channels(); }
};

struct Layer {
    Sizes s;
    Buffer<float> conv, rates, dt_bias, gate_norm;
    Layer(Random &random, const Sizes &sizes) : s(sizes) {
        const auto fill = [&](Buffer<float> &to, int64_t size, bool positive) {
            to.resize(size);
            for (float &value : to) value = positive ? static_cast<float>(random.uniform()) : random.normal();
        };
        fill(conv, s.conv_width * s.channels(), false);
        fill(rates, s.value_heads, true);
        fill(dt_bias, s.value_heads, false);
        fill(gate_norm, s.value_dim, false);
    }
};

struct Sequence {
    Buffer<float> x, gates, state, out;
    int64_t rows, done = 0;
    Sequence(Random &random, const Sizes &s, int64_t num_rows) : rows(num_rows) {
        x.resize(rows * (s.channels() + s.out()));
        gates.resize(rows * 2 * s.value_heads);
        for (float &value : x) value = random.normal();
        for (float &value : gates) value = random.normal();
        state.assign(s.state(), std::numeric_limits<float>::quiet_NaN());  // not read at the start
    }
};

// The next `rows` rows of each sequence (0: none of it) in one call.
void run(krasis_pool *pool, const Layer &layer, std::vector<Sequence> &sequences, const std::vector<int64_t> &rows) {
    const Sizes &s = layer.s;
    const int64_t ldx = s.channels() + s.out();
    Buffer<float> x, gates;
    std::vector<krasis_span> spans;
    int64_t row = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence &one = sequences[i];
        x.insert(x.end(), one.x.begin() + one.done * ldx, one.x.begin() + (one.done + rows[i]) * ldx);
        gates.insert(gates.end(), one.gates.begin() + one.done * 2 * s.value_heads,
                     one.gates.begin() + (one.done + rows[i]) * 2 * s.value_heads);
        spans.push_back({row, rows[i], one.done, one.state.data(), nullptr});
        row += rows[i];
    }
    Buffer<float> out(row * s.out());
    krasis_gated_delta_args args{};
    args.x = x.data(), args.ldx = ldx, args.tokens = row;
    args.key_heads = s.key_heads, args.value_heads = s.value_heads;
    args.key_dim = s.key_dim, args.value_dim = s.value_dim, args.conv_width = s.conv_width;
    args.gates = gates.data(), args.conv = layer.conv.data(), args.rates = layer.rates.data();
    args.dt_bias = layer.dt_bias.data(), args.gate_norm = layer.gate_norm.data(), args.eps = 1e-6f;
    args.spans = spans.data(), args.num_spans = static_cast<int64_t>(spans.size());
    args.columns_offset_bytes = s.matrices() * static_cast<int64_t>(sizeof(float));
    args.out = out.data();
    CHECK_OK(krasis_gated_delta(pool, &args));
    row = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence &one = sequences[i];
        one.out.insert(one.out.end(), out.begin() + row * s.out(), out.begin() + (row + rows[i]) * s.out());
        one.done += rows[i];
        row += rows[i];
    }
}

void check_bits(const Sizes &sizes) {
    Random random(7);
    const Layer layer(random, sizes);
    std::vector<Sequence> sequences;
    for (const int64_t rows : {9, 1, 33}) sequences.emplace_back(random, sizes, rows);
    std::vector<Sequence> expected = sequences;
    {
        Pool pool(1, KRASIS_ISA_AVX2);
        for (Sequence &one : expected) {
            std::vector<Sequence> alone{one};
            run(pool, layer, alone, {one.rows});
            one = alone[0];
            for (const float value : one.out) CHECK(value == value);
        }
    }
    for (const int32_t isa : test::available_isas()) {
        for (const int32_t threads : {1, 3}) {
            Pool pool(threads, isa);
            std::vector<Sequence> found = sequences;
            run(pool, layer, found, {4, 0, 20});
            run(pool, layer, found, {1, 1, 1});
            run(pool, layer, found, {4, 0, 12});
            for (size_t i = 0; i < found.size(); ++i) {
                CHECK(test::same_bits(found[i].out, expected[i].out));
                CHECK(test::same_bits(found[i].state, expected[i].state));
            }
        }
    }
}

void check_refusals() {
    Random random(8);
    const Sizes sizes{1, 2, 16, 16, 4};
    const Layer layer(random, sizes);
    Pool pool(1, KRASIS_ISA_AUTO);
    Sequence one(random, sizes, 2);
    Buffer<float> out(2 * sizes.out());
    krasis_span span{0, 2, 0, one.state.data(), nullptr};
    krasis_gated_delta_args good{};
    good.x = one.x.data(), good.ldx = sizes.channels() + sizes.out(), good.tokens = 2;
    good.key_heads = 1, good.value_heads = 2, good.key_dim = 16, good.value_dim = 16, good.conv_width = 4;
    good.gates = one.gates.data(), good.conv = layer.conv.data(), good.rates = layer.rates.data();
    good.dt_bias = layer.dt_bias.data(), good.gate_norm = layer.gate_norm.data();
    good.spans = &span, good.num_spans = 1, good.out = out.data();
    good.columns_offset_bytes = sizes.matrices() * 4;
    const auto refused = [&](int32_t status, auto change) {
        krasis_gated_delta_args bad = good;
        change(bad);
        CHECK(krasis_gated_delta(pool, &bad) == status);
    };
    refused(KRASIS_ERR_ARGUMENT, [](auto &a) { a.conv = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](auto &a) { a.gate = 2; });
    refused(KRASIS_ERR_ARGUMENT, [](auto &a) { a.tokens = -1; });
    refused(KRASIS_ERR_ARGUMENT, [](auto &a) { a.spans = nullptr; });
    refused(KRASIS_ERR_SHAPE, [](auto &a) { a.ldx -= 1; });
    refused(KRASIS_ERR_SHAPE, [](auto &a) { a.key_dim = 24; });
    refused(KRASIS_ERR_SHAPE, [](auto &a) { a.conv_width = 9; });
    refused(KRASIS_ERR_SHAPE, [](auto &a) { a.key_heads = 3; });
    refused(KRASIS_ERR_SHAPE, [](auto &a) { a.value_heads = INT64_MAX; });
    refused(KRASIS_ERR_RANGE, [](auto &a) { a.tokens = 3; });
    span.first_row = 1;
    refused(KRASIS_ERR_ARGUMENT, [](auto &) {});
    span = {0, 3, 0, one.state.data(), nullptr};
    refused(KRASIS_ERR_RANGE, [](auto &) {});
    span = {0, 2, 0, nullptr, nullptr};
    refused(KRASIS_ERR_ARGUMENT, [](auto &) {});
}

}  // namespace

int main() {
    for (const Sizes &sizes : {Sizes{2, 4, 32, 48, 4}, Sizes{1, 3, 16, 16, 1}, Sizes{3, 3, 256, 256, 8}})
        check_bits(sizes);
    check_refusals();
    return test::finish("delta");
}
