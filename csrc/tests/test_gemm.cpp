// test_gemm.cpp: krasis_gemm_int8_rows and krasis_gemm_float against scalar forms; bits independent of batch, threads,
// ISA.
#include <memory>

#include "reference.h"

namespace {

using test::Acts;
using test::Buffer;
using test::Pool;
using test::Random;

struct RowsCase {
    Acts acts;
    int64_t n, ldo;
    Buffer<int8_t> weight;  // [n/32, k/4, 32, 4]
    Buffer<float> scales, start;

    RowsCase(Random &random, int64_t tokens, int64_t k, int64_t rows)
        : acts(random, tokens, k),
          n(rows),
          ldo(rows + random.below(9)),
          weight(rows * k),
          scales(rows),
          start(tokens * ldo) {
        for (int8_t &code : weight) code = static_cast<int8_t>(random.next());
        for (float &scale : scales) scale = static_cast<float>(random.uniform() * 0.01);
        for (float &value : start) value = random.normal();
    }
    int code(int64_t row, int64_t i) const {
        return weight[(row / 32 * (acts.k / 4) + i / 4) * 128 + row % 32 * 4 + i % 4];
    }
    Buffer<float> expected(bool accumulate) const {
        Buffer<float> out = start;
        for (int64_t t = 0; t < acts.tokens; ++t) {
            for (int64_t r = 0; r < n; ++r) {
                const float sum = test::strip_element(
                    acts, t, [&](int64_t i) { return code(r, i); }, [](int64_t, float scale) { return scale; });
                float &to = out[t * ldo + r];
                to = accumulate ? to + sum * scales[r] : sum * scales[r];
            }
        }
        return out;
    }
    Buffer<float> run(krasis_pool *pool, bool accumulate, int64_t batch) {
        Buffer<float> out = start;
        for (int64_t t = 0; t < acts.tokens; t += batch) {
            const krasis_acts view = acts.view(t, std::min(batch, acts.tokens - t));
            CHECK_OK(krasis_gemm_int8_rows(pool, &view, weight.data(), scales.data(), n, out.data() + t * ldo, ldo,
                                           accumulate));
        }
        return out;
    }
};

void int8_rows() {
    Random random(11);
    const int64_t token_counts[] = {1, 2, 3, 4, 5, 6, 7, 11, 13, 49, 55};
    for (int64_t tokens : token_counts) {
        // k not a multiple of 64 would misalign rows of q, which the ABI wants 64-byte aligned only at the start.
        RowsCase test_case(random, tokens, 32 * random.between(1, 9) * 2, 32 * random.between(1, 4));
        const bool accumulate = random.below(2);
        const Buffer<float> expected = test_case.expected(accumulate);
        for (int32_t isa : test::available_isas()) {
            for (int32_t threads : {1, 2, 5}) {
                Pool pool(threads, isa);
                CHECK(test::same_bits(test_case.run(pool, accumulate, tokens), expected));
                CHECK(test::same_bits(test_case.run(pool, accumulate, 1), expected));
                CHECK(test::same_bits(test_case.run(pool, accumulate, 4), expected));
            }
        }
    }
}

// More tokens than one chunk, and enough blocks for several groups of weights.
void int8_rows_large() {
    Random random(12);
    RowsCase test_case(random, 1100, 64, 64), deep(random, 13, 4096, 32);
    const Buffer<float> expected = test_case.expected(false), expected_deep = deep.expected(true);
    for (int32_t isa : test::available_isas()) {
        Pool pool(3, isa);
        CHECK(test::same_bits(test_case.run(pool, false, 1100), expected));
        CHECK(test::same_bits(deep.run(pool, true, 13), expected_deep));
    }
}

// Rows enough for AMX, with last panels of every width, one chunk of tokens and more, and sets of blocks that are not
// full; for heads too, whose product is that of rows, head by head.
void int8_rows_in_tiles() {
    Random random(15);
    for (int64_t tokens : {32, 33, 38, 39, 43, 46, 48, 150}) {
        RowsCase test_case(random, tokens, 64 * random.between(1, 11) + 32 * random.below(2), 32);
        const bool accumulate = random.below(2);
        const Buffer<float> expected = test_case.expected(accumulate);
        for (int32_t isa : test::available_isas()) {
            Pool pool(2, isa);
            CHECK(test::same_bits(test_case.run(pool, accumulate, tokens), expected));
            CHECK(test::same_bits(test_case.run(pool, accumulate, 34), expected));
        }
    }
    constexpr int64_t kTokens = 41, kHeads = 3, kRows = 64, kDepth = 128;
    RowsCase heads(random, kTokens * kHeads, kDepth, kHeads * kRows);
    for (int32_t isa : test::available_isas()) {
        Pool pool(2, isa), plain(1, KRASIS_ISA_AVX2);
        const krasis_acts all = heads.acts.view(0, kTokens * kHeads);
        Buffer<float> out(kTokens * kHeads * kRows), expected(kRows);
        CHECK_OK(krasis_gemm_int8_heads(pool, &all, heads.weight.data(), heads.scales.data(), kHeads, kRows, out.data(),
                                        kRows, kHeads * kRows));
        for (int64_t row = 0; row < kTokens * kHeads; ++row) {
            const int64_t head = row % kHeads;
            const krasis_acts one = heads.acts.view(row, 1);
            CHECK_OK(krasis_gemm_int8_rows(plain, &one, heads.weight.data() + head * kRows * kDepth,
                                           heads.scales.data() + head * kRows, kRows, expected.data(), kRows, 0));
            CHECK(std::equal(expected.begin(), expected.end(), out.begin() + row * kRows));
        }
    }
}

void float_product() {
    Random random(13);
    for (int round = 0; round < 24; ++round) {
        const int32_t dtype = round % 3;
        const int64_t tokens = random.between(1, 37), k = random.between(1, 300), n = random.between(1, 70);
        const int64_t width = dtype == KRASIS_F32 ? 4 : 2;
        Buffer<float> x(tokens * k), weight_values(n * k);
        Buffer<uint8_t> weight(n * k * width);
        for (float &value : x) value = random.normal();
        for (int64_t i = 0; i < n * k; ++i) {
            const float value = random.normal();
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            if (dtype == KRASIS_F32) {
                weight_values[i] = value;
                std::memcpy(&weight[i * 4], &value, 4);
                continue;
            }
            const uint16_t code = dtype == KRASIS_BF16
                                      ? static_cast<uint16_t>(bits >> 16)
                                      : static_cast<uint16_t>(random.below(0x7c00) | (random.below(2) << 15));
            weight_values[i] = dtype == KRASIS_BF16 ? test::bfloat_to_float(code) : test::half_to_float(code);
            std::memcpy(&weight[i * 2], &code, 2);
        }
        std::unique_ptr<Buffer<float>> first;
        for (int32_t isa : test::available_isas()) {
            for (int32_t threads : {1, 3}) {
                Pool pool(threads, isa);
                Buffer<float> out(tokens * n), single(tokens * n);
                CHECK_OK(krasis_gemm_float(pool, x.data(), tokens, k, weight.data(), dtype, n, out.data()));
                for (int64_t t = 0; t < tokens; ++t) {
                    CHECK_OK(krasis_gemm_float(pool, &x[t * k], 1, k, weight.data(), dtype, n, &single[t * n]));
                }
                CHECK(test::same_bits(out, single));
                if (!first) first = std::make_unique<Buffer<float>>(out);
                CHECK(test::same_bits(out, *first));
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t r = 0; r < n; ++r) {
                double sum = 0, magnitude = 0;
                for (int64_t i = 0; i < k; ++i) {
                    const double term = static_cast<double>(x[t * k + i]) * weight_values[r * k + i];
                    sum += term;
                    magnitude += std::abs(term);
                }
                CHECK(std::abs((*first)[t * n + r] - sum) <= 4e-6 * magnitude);
            }
        }
    }
}

void arguments() {
    Random random(14);
    RowsCase c(random, 2, 64, 64);
    Pool pool(1, KRASIS_ISA_AUTO);
    const krasis_acts acts = c.acts.view(0, 2);
    Buffer<float> out(2 * 64);
    const auto rows = [&](krasis_pool *p, const krasis_acts *a, const int8_t *w, const float *s, int64_t n, float *o,
                          int64_t ldo) { return krasis_gemm_int8_rows(p, a, w, s, n, o, ldo, 0); };
    const int8_t *w = c.weight.data();
    const float *s = c.scales.data();
    CHECK(rows(nullptr, &acts, w, s, 64, out.data(), 64) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, nullptr, w, s, 64, out.data(), 64) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, &acts, nullptr, s, 64, out.data(), 64) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, &acts, w, nullptr, 64, out.data(), 64) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, &acts, w, s, 64, nullptr, 64) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, &acts, w, s, 64, out.data(), 63) == KRASIS_ERR_ARGUMENT);
    CHECK(rows(pool, &acts, w, s, 33, out.data(), 64) == KRASIS_ERR_SHAPE);
    krasis_acts bad = acts;
    bad.k = 48;
    CHECK(rows(pool, &bad, w, s, 64, out.data(), 64) == KRASIS_ERR_SHAPE);
    bad = acts;
    bad.sum = nullptr;
    CHECK(rows(pool, &bad, w, s, 64, out.data(), 64) == KRASIS_ERR_ARGUMENT);
    bad = acts;
    bad.tokens = 0;
    CHECK(rows(pool, &bad, w, s, 64, out.data(), 64) == KRASIS_OK);
    CHECK(krasis_gemm_float(pool, out.data(), 1, 8, w, 9, 4, out.data()) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_gemm_float(pool, nullptr, 1, 8, w, 0, 4, out.data()) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_gemm_float(pool, nullptr, 0, 8, w, 0, 4, out.data()) == KRASIS_OK);
    double seconds = -1;
    CHECK(krasis_read_bandwidth(pool, w, 64 * 64, &seconds) == KRASIS_OK && seconds >= 0);
    CHECK(krasis_read_bandwidth(pool, w, 1001, &seconds) == KRASIS_OK);
    CHECK(krasis_read_bandwidth(pool, nullptr, 64, &seconds) == KRASIS_ERR_ARGUMENT);
}

}  // namespace

int main() {
    int8_rows_in_tiles();
    int8_rows_large();
    if (!test::kAmxTwin) {  // the rest has little to do with it
        int8_rows();
        float_product();
        arguments();
    }
    test::say_amx();
    return test::finish("gemm");
}
