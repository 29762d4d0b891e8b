// test_latent_rows.cpp: what is kept of a token, what happens to its query, and products of heads, against float64.
#include <algorithm>
#include <cmath>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

size_t count(int64_t n) { return static_cast<size_t>(n); }

// ---- the cache and the queries

struct StoreCase {
    int64_t tokens, num_heads, nope_dim, rope_dim, kv_rank;
    int32_t dtype, norm_dtype, interleaved;
    bool turns = true;
    float temperature = 0;
};

struct Store {
    static constexpr int64_t kStart = 5, kCapacity = 40, kPeriod = 3, kShift = 1;
    static constexpr float kEps = 1e-6f;
    StoreCase c;
    int64_t width, q_stride, kv_stride;
    Matrix q, norm, cache, before;
    Array<float> kv, cos, sin;

    explicit Store(const StoreCase &given)
        : c(given),
          width(c.kv_rank + c.rope_dim),
          q_stride(c.num_heads * (c.nope_dim + c.rope_dim) + 8),
          kv_stride(width + 4),
          q(count(c.tokens * q_stride), c.dtype),
          norm(count(c.kv_rank), c.norm_dtype),
          cache(count(kCapacity * width), c.dtype),
          before(q.bytes.size() / 2, c.dtype),
          kv(count(c.tokens * kv_stride)),
          cos(count(kCapacity * std::max<int64_t>(1, c.rope_dim / 2))),
          sin(cos.size()) {
        Random random(static_cast<uint64_t>(c.kv_rank + c.nope_dim));
        for (size_t i = 0; i < count(c.tokens * q_stride); ++i) q.set(i, random.normal());
        std::memcpy(before.bytes.data(), q.bytes.data(), q.bytes.size());
        for (size_t i = 0; i < kv.size(); ++i) kv[i] = 3 * random.normal();
        for (size_t i = 0; i < count(c.kv_rank); ++i) norm.set(i, 1 + 0.2f * random.normal());
        for (size_t i = 0; i < cos.size(); ++i) {
            cos[i] = std::cos(static_cast<float>(i));
            sin[i] = 1.25f * std::sin(static_cast<float>(i));  // not of one circle: YaRN scales both
        }
    }

    krasis_cuda_latent_args args() {
        krasis_cuda_latent_args a{};
        a.q = q.bytes.upload();
        a.kv = kv.upload();
        a.q_stride = q_stride;
        a.kv_stride = kv_stride;
        a.tokens = c.tokens;
        a.start = kStart;
        a.num_heads = c.num_heads;
        a.nope_dim = c.nope_dim;
        a.rope_dim = c.rope_dim;
        a.kv_rank = c.kv_rank;
        a.norm = norm.bytes.upload();
        a.dtype = c.dtype;
        a.norm_dtype = c.norm_dtype;
        a.eps = kEps;
        a.interleaved = c.interleaved;
        a.cos = cos.upload();
        a.sin = sin.upload();
        a.max_positions = kCapacity;
        a.rotary_dims = c.turns ? c.rope_dim : 0;
        a.temperature_scale = c.temperature;
        a.temperature_shift = kShift;
        a.temperature_period = kPeriod;
        a.cache = cache.bytes.upload();
        a.capacity = kCapacity;
        return a;
    }

    // Channel i of the rotated part, of numbers given by their place in it.
    template <class Get>
    double turned(Get &&x, int64_t i, int64_t position) const {
        if (!c.turns) return x(i);
        const int64_t half = c.rope_dim / 2, pair = c.interleaved ? i / 2 : i % half;
        const bool is_first = c.interleaved ? i % 2 == 0 : i < half;
        const double a = x(c.interleaved ? 2 * pair : pair), b = x(c.interleaved ? 2 * pair + 1 : half + pair);
        const double cosine = cos[count(position * half + pair)], sine = sin[count(position * half + pair)];
        return is_first ? a * cosine - b * sine : b * cosine + a * sine;
    }

    void near(double got, double expected) const { CHECK(std::fabs(got - expected) <= 4 * q.rounding() * 4); }

    void check_token(int64_t t, int64_t position) const {
        double square = 0;
        const float *own = kv.data() + t * kv_stride;
        for (int64_t i = 0; i < c.kv_rank; ++i) square += double(own[i]) * own[i];
        const double scale = 1 / std::sqrt(square / double(c.kv_rank) + kEps);
        for (int64_t i = 0; i < c.kv_rank; ++i) {
            near(cache.get(count(position * width + i)), own[i] * scale * norm.get(count(i)));
        }
        for (int64_t i = 0; i < c.rope_dim; ++i) {
            const auto shared = [&](int64_t j) { return double(own[c.kv_rank + j]); };
            const double expected = turned(shared, i, position);
            CHECK(std::fabs(cache.get(count(position * width + c.kv_rank + i)) - expected) <=
                  q.rounding() * (1 + std::fabs(expected)));
        }
        const double factor =
            c.temperature == 0 ? 1 : 1 + c.temperature * std::log(1 + std::floor((position + kShift) / kPeriod));
        for (int64_t h = 0; h < c.num_heads; ++h) {
            const size_t at = count(t * q_stride + h * (c.nope_dim + c.rope_dim));
            for (size_t i = 0; i < count(c.nope_dim); ++i) near(q.get(at + i), before.get(at + i) * factor);
            const auto rest = [&](int64_t j) { return before.get(at + count(c.nope_dim + j)) * factor; };
            for (int64_t i = 0; i < c.rope_dim; ++i) {
                near(q.get(at + count(c.nope_dim + i)), turned(rest, i, position));
            }
        }
    }

    void run() {
        const auto a = args();
        CHECK_OK(krasis_cuda_latent_store(&a, nullptr));
        q.bytes.download();
        cache.bytes.download();
        for (int64_t t = 0; t < c.tokens; ++t) check_token(t, kStart + t);
        CHECK(std::isnan(cache.get(count((kStart - 1) * width))));
        CHECK(std::isnan(cache.get(count((kStart + c.tokens) * width))));
    }

    // Rows of several sequences, at positions of their own; one belongs to nobody, one lies beyond the cache.
    void run_rows() {
        constexpr int64_t kPositions[] = {31, -1, 0, kCapacity};
        constexpr int64_t kOffset = 64;
        const size_t slot = cache.bytes.size() + kOffset;
        Array<uint8_t> slots(4 * slot);
        slots.poison();
        Array<krasis_cuda_row> rows(4);
        auto a = args();
        uint8_t *memory = slots.upload();
        for (size_t r = 0; r < 4; ++r) rows[r] = {kPositions[r], memory + r * slot, nullptr};
        a.rows = rows.upload();
        a.cache = nullptr;
        a.keys_offset = kOffset;
        a.tokens = 4;
        CHECK_OK(krasis_cuda_latent_store(&a, nullptr));
        q.bytes.download();
        slots.download();
        for (size_t r = 0; r < 4; ++r) {
            const bool fits = kPositions[r] >= 0 && kPositions[r] < kCapacity;
            std::memcpy(cache.bytes.data(), slots.data() + r * slot + kOffset, cache.bytes.size());
            if (fits) check_token(static_cast<int64_t>(r), kPositions[r]);
            size_t written = 0;
            for (size_t i = 0; i < slot; ++i) written += slots[r * slot + i] != 0xff;
            CHECK(fits ? written > 0 && written <= 2 * count(width) : written == 0);
        }
    }
};

void check_store() {
    Store({3, 3, 64, 16, 96, KRASIS_BF16, KRASIS_F32, 1}).run();
    Store({2, 2, 32, 64, 512, KRASIS_F16, KRASIS_BF16, 0}).run();
    Store({4, 1, 32, 32, 64, KRASIS_F16, KRASIS_F16, 1, true, 0.1f}).run();
    Store({2, 2, 32, 16, 64, KRASIS_F16, KRASIS_F16, 1, false, 0.2f}).run();
    Store({2, 2, 32, 0, 64, KRASIS_BF16, KRASIS_F32, 0}).run();
    Store({4, 2, 32, 16, 64, KRASIS_F16, KRASIS_F16, 1}).run_rows();
    Store store({2, 2, 32, 16, 64, KRASIS_F16, KRASIS_F16, 1});
    const auto good = store.args();
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_latent_store(&args, nullptr) == status);
    };
    using Args = krasis_cuda_latent_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.cache = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.sin = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.temperature_scale = 1, a.temperature_period = 0; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.rotary_dims = 8; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.kv_stride = 64; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.start = a.capacity - 1; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.max_positions = a.start + 1; });
    CHECK(krasis_cuda_latent_store(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

// ---- products of heads

void check_products(int64_t tokens, int64_t num_heads, int64_t k, int64_t n, int32_t dtype) {
    const int64_t x_head = k + 16, out_head = n + 8, x_stride = num_heads * x_head + 8;
    const int64_t out_stride = num_heads * out_head;
    Matrix x(count(tokens * x_stride), dtype), out(count(tokens * out_stride), dtype);
    Array<int8_t> packed(count(num_heads * n * k));
    std::vector<int8_t> codes(packed.size());
    Array<float> scales(count(num_heads * n));
    Random random(static_cast<uint64_t>(tokens * 100 + n));
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < num_heads; ++h) {
            for (int64_t i = 0; i < k; ++i) x.set(count(t * x_stride + h * x_head + i), random.normal());
        }
    }
    for (int64_t j = 0; j < num_heads * n; ++j) {
        scales[count(j)] = static_cast<float>(0.001 + 0.01 * random.uniform());
        for (int64_t i = 0; i < k; ++i) {
            const auto code = static_cast<int8_t>(random.below(256) - 128);
            codes[count(j * k + i)] = code;
            packed[count(((j / 32 * (k / 4) + i / 4) * 32 + j % 32) * 4 + i % 4)] = code;
        }
    }
    krasis_cuda_int8_heads_args a{};
    a.x = x.bytes.upload();
    a.x_stride = x_stride;
    a.x_head_stride = x_head;
    a.tokens = tokens;
    a.num_heads = num_heads;
    a.k = k;
    a.n = n;
    a.dtype = dtype;
    a.weight = packed.upload();
    a.scales = scales.upload();
    a.out = out.bytes.upload();
    a.out_stride = out_stride;
    a.out_head_stride = out_head;
    CHECK_OK(krasis_cuda_int8_heads(&a, nullptr));
    out.bytes.download();
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < num_heads; ++h) {
            const size_t at = count(t * out_stride + h * out_head);
            for (int64_t j = 0; j < n; ++j) {
                double value = 0, size = 0;
                for (int64_t i = 0; i < k; ++i) {
                    const double term = x.get(count(t * x_stride + h * x_head + i)) * codes[count((h * n + j) * k + i)];
                    value += term;
                    size += std::fabs(term);
                }
                const double scale = scales[count(h * n + j)];
                CHECK(std::fabs(out.get(at + count(j)) - value * scale) <=
                      2e-5 * size * scale + out.rounding() * std::fabs(value) * scale);
            }
            CHECK(std::isnan(out.get(at + count(n))));  // between the heads
        }
    }
    auto bad = a;
    bad.k = 32;
    CHECK(krasis_cuda_int8_heads(&bad, nullptr) == KRASIS_ERR_SHAPE);
    bad = a;
    bad.out_head_stride = n - 8;
    CHECK(krasis_cuda_int8_heads(&bad, nullptr) == KRASIS_ERR_SHAPE);
    bad = a;
    bad.scales = nullptr;
    CHECK(krasis_cuda_int8_heads(&bad, nullptr) == KRASIS_ERR_ARGUMENT);
}

}  // namespace

void run_latent_rows() {
    check_store();
    check_products(1, 3, 64, 96, KRASIS_BF16);
    check_products(2, 2, 128, 32, KRASIS_F16);
    check_products(5, 3, 64, 160, KRASIS_F16);
    check_products(70, 2, 192, 32, KRASIS_BF16);
}

}  // namespace test
