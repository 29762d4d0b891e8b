// test_attention_rows.cpp: RMSNorm, and norm, rotation and storing of heads, against float64.
#include <cmath>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

void check_rms_norm(int32_t x_dtype, int32_t weight_dtype, int32_t out_dtype, int64_t k) {
    Random random(static_cast<uint64_t>(k));
    constexpr int64_t kTokens = 3;
    constexpr float kEps = 1e-6f;
    const auto columns = static_cast<size_t>(k);
    Matrix x(kTokens * columns, x_dtype), weight(columns, weight_dtype), out(kTokens * columns, out_dtype);
    for (size_t i = 0; i < kTokens * columns; ++i) x.set(i, random.normal() * (i < columns ? 1e-3f : 3.0f));
    for (size_t i = 0; i < columns; ++i) weight.set(i, random.normal());
    const krasis_cuda_rms_norm_args args{x.bytes.upload(), weight.bytes.upload(), out.bytes.upload(), kTokens, k,
                                         x_dtype,          weight_dtype,          out_dtype,          kEps};
    CHECK_OK(krasis_cuda_rms_norm(&args, nullptr));
    out.bytes.download();
    for (size_t t = 0; t < kTokens; ++t) {
        double square = 0;
        for (size_t i = 0; i < columns; ++i) square += x.get(t * columns + i) * x.get(t * columns + i);
        const double scale = 1 / std::sqrt(square / static_cast<double>(k) + kEps);
        for (size_t i = 0; i < columns; ++i) {
            const double value = x.get(t * columns + i) * scale * weight.get(i);
            CHECK(std::fabs(out.get(t * columns + i) - value) <= (out.rounding() + 2e-6) * std::fabs(value) + 0x1p-24);
        }
    }
    auto wrong = args;
    wrong.k = k + 4;
    CHECK(krasis_cuda_rms_norm(&wrong, nullptr) == KRASIS_ERR_SHAPE);
}

struct Heads {
    int64_t tokens, start, num_heads, num_kv_heads, head_dim;
    int32_t dtype, norm_dtype;
    bool with_norm;
};

// The same launch again with its position in device memory: the same bits. A position beyond the cache: nothing
// happens.
void check_start_on_device(krasis_cuda_qkv_args args, const Heads &c, Matrix &qkv, Matrix &before, Matrix &k_cache,
                           Matrix &v_cache) {
    const Matrix *written[] = {&qkv, &k_cache, &v_cache};
    std::vector<std::vector<uint8_t>> expected;
    for (const Matrix *m : written) expected.emplace_back(m->bytes.data(), m->bytes.data() + m->bytes.size());
    auto run = [&](int64_t start) {
        std::memcpy(qkv.bytes.data(), before.bytes.data(), before.bytes.size());
        for (Matrix *m : {&k_cache, &v_cache}) m->bytes.poison();
        Array<int64_t> position(1, start);
        args.qkv = qkv.bytes.upload();
        args.k_cache = k_cache.bytes.upload();
        args.v_cache = v_cache.bytes.upload();
        args.start = -5;  // not looked at
        args.start_device = position.upload();
        CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
        for (Matrix *m : {&qkv, &k_cache, &v_cache}) m->bytes.download();
    };
    run(c.start);
    for (size_t i = 0; i < 3; ++i) {
        CHECK(std::memcmp(written[i]->bytes.data(), expected[i].data(), expected[i].size()) == 0);
    }
    for (int64_t start : {int64_t{24}, int64_t{-c.tokens}, INT64_MAX - 100}) {
        run(start);
        CHECK(std::memcmp(qkv.bytes.data(), before.bytes.data(), before.bytes.size()) == 0);
        for (const Matrix *cache : {&k_cache, &v_cache}) {
            for (size_t i = 0; i < cache->bytes.size(); ++i) CHECK(cache->bytes[i] == 0xff);
        }
    }
}

void check_heads(const Heads &c) {
    Random random(static_cast<uint64_t>(c.head_dim));
    constexpr int64_t kCapacity = 24, kPositions = 40;
    constexpr float kEps = 1e-6f;
    const int64_t heads = c.num_heads + 2 * c.num_kv_heads, half = c.head_dim / 2;
    const auto dim = static_cast<size_t>(c.head_dim);
    Matrix qkv(static_cast<size_t>(c.tokens * heads) * dim, c.dtype),
        before(static_cast<size_t>(c.tokens * heads) * dim, c.dtype);
    Matrix q_norm(dim, c.norm_dtype), k_norm(dim, c.norm_dtype);
    Matrix k_cache(static_cast<size_t>(c.num_kv_heads * kCapacity) * dim, c.dtype);
    Matrix v_cache(static_cast<size_t>(c.num_kv_heads * kCapacity) * dim, c.dtype);
    Array<float> cosines(static_cast<size_t>(kPositions * half)), sines(static_cast<size_t>(kPositions * half));
    for (size_t i = 0; i < static_cast<size_t>(c.tokens * heads) * dim; ++i) {
        const float value = random.normal();
        qkv.set(i, value);
        before.set(i, value);
    }
    for (size_t i = 0; i < dim; ++i) q_norm.set(i, random.normal()), k_norm.set(i, random.normal());
    for (size_t i = 0; i < cosines.size(); ++i) {
        const double angle = 6.28 * random.uniform();
        cosines[i] = static_cast<float>(std::cos(angle));
        sines[i] = static_cast<float>(std::sin(angle));
    }
    krasis_cuda_qkv_args args{};
    args.qkv = qkv.bytes.upload();
    args.tokens = c.tokens;
    args.start = c.start;
    args.num_heads = c.num_heads;
    args.num_kv_heads = c.num_kv_heads;
    args.head_dim = c.head_dim;
    args.q_norm = c.with_norm ? q_norm.bytes.upload() : nullptr;
    args.k_norm = c.with_norm ? k_norm.bytes.upload() : nullptr;
    args.dtype = c.dtype;
    args.norm_dtype = c.norm_dtype;
    args.eps = kEps;
    args.cos = cosines.upload();
    args.sin = sines.upload();
    args.max_positions = kPositions;
    args.k_cache = k_cache.bytes.upload();
    args.v_cache = v_cache.bytes.upload();
    args.capacity = kCapacity;
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    for (Matrix *m : {&qkv, &k_cache, &v_cache}) m->bytes.download();

    std::vector<char> stored(static_cast<size_t>(c.num_kv_heads * kCapacity), 0);
    for (int64_t t = 0; t < c.tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
            const size_t at = static_cast<size_t>(t * heads + h) * dim;
            const bool is_q = h < c.num_heads, is_v = h >= c.num_heads + c.num_kv_heads;
            const int64_t kv_head = is_v ? h - c.num_heads - c.num_kv_heads : h - c.num_heads;
            const int64_t cell = kv_head * kCapacity + c.start + t;
            if (!is_q) stored[static_cast<size_t>(cell)] = 1;
            double square = 0;
            for (size_t i = 0; i < dim; ++i) square += before.get(at + i) * before.get(at + i);
            const double scale = 1 / std::sqrt(square / static_cast<double>(dim) + kEps);
            auto normed = [&](size_t i) {
                const double value = before.get(at + i);
                return is_v || !c.with_norm ? value : value * scale * (is_q ? q_norm : k_norm).get(i);
            };
            for (size_t i = 0; i < dim; ++i) {
                const auto pair = i % static_cast<size_t>(half);
                const auto table = static_cast<size_t>((c.start + t) * half) + pair;
                const double x = normed(pair), y = normed(pair + static_cast<size_t>(half));
                double value = i < static_cast<size_t>(half) ? x * cosines[table] - y * sines[table]
                                                             : y * cosines[table] + x * sines[table];
                if (is_v) value = before.get(at + i);
                const Matrix &to = is_q ? qkv : is_v ? v_cache : k_cache;
                const double got = to.get(is_q ? at + i : static_cast<size_t>(cell) * dim + i);
                const double size = std::fabs(x) + std::fabs(y);
                CHECK(std::fabs(got - value) <= to.rounding() * std::fabs(value) + 2e-6 * size + 0x1p-24);
            }
            if (!is_q) {
                for (size_t i = 0; i < dim; ++i) CHECK(qkv.get(at + i) == before.get(at + i));
            }
        }
    }
    for (size_t cell = 0; cell < stored.size(); ++cell) {
        if (!stored[cell]) CHECK(std::isnan(k_cache.get(cell * dim)) && std::isnan(v_cache.get(cell * dim + dim - 1)));
    }
    check_start_on_device(args, c, qkv, before, k_cache, v_cache);
    args.start = kCapacity - c.tokens + 1;
    CHECK(krasis_cuda_qk_norm_rope_store(&args, nullptr) == KRASIS_ERR_RANGE);
    args.start = 0;
    args.head_dim = 272;
    CHECK(krasis_cuda_qk_norm_rope_store(&args, nullptr) == KRASIS_ERR_SHAPE);
}

}  // namespace

void run_attention_rows() {
    for (int32_t x : kDtypes) {
        for (int32_t out : kDtypes)
            check_rms_norm(x, x == out ? KRASIS_F32 : KRASIS_BF16, out, x == KRASIS_F32 ? 4104 : 768);
    }
    check_heads({5, 0, 4, 2, 128, KRASIS_BF16, KRASIS_BF16, true});
    check_heads({3, 17, 3, 1, 64, KRASIS_F16, KRASIS_F32, true});
    check_heads({1, 9, 2, 2, 256, KRASIS_BF16, KRASIS_F16, true});
    check_heads({2, 0, 2, 1, 80, KRASIS_F16, KRASIS_F16, false});
}

}  // namespace test
