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
    int64_t rotary_dims;
    bool flat = false, interleaved = false, with_bias = false;
    float clip = 0;
    bool shared_kv = false, value_norm = false;
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

constexpr int64_t kCapacity = 24, kPositions = 40;
constexpr float kEps = 1e-6f;

size_t size_of(int64_t count) { return static_cast<size_t>(count); }

// Rows of q, k and v, weights, tables and one cache, all random.
struct HeadsProblem {
    Heads c;
    int64_t heads, stored, pairs;  // stored: heads of a row, without those that others are the values of
    size_t dim;
    Matrix qkv, before, q_norm, k_norm, k_cache, v_cache;
    Array<float> cosines, sines, bias;

    explicit HeadsProblem(const Heads &given)
        : c(given),
          heads(c.num_heads + 2 * c.num_kv_heads),
          stored(c.num_heads + (c.shared_kv ? 1 : 2) * c.num_kv_heads),
          pairs(c.rotary_dims / 2),
          dim(size_of(c.head_dim)),
          qkv(size_of(c.tokens * stored) * dim, c.dtype),
          before(size_of(c.tokens * stored) * dim, c.dtype),
          q_norm(dim * size_of(c.flat ? c.num_heads : 1), c.norm_dtype),
          k_norm(dim * size_of(c.flat ? c.num_kv_heads : 1), c.norm_dtype),
          k_cache(size_of(c.num_kv_heads * kCapacity) * dim, c.dtype),
          v_cache(size_of(c.num_kv_heads * kCapacity) * dim, c.dtype),
          cosines(size_of(kPositions * pairs + 1)),
          sines(size_of(kPositions * pairs + 1)),
          bias(size_of(heads) * dim) {
        Random random(static_cast<uint64_t>(c.head_dim));
        for (size_t i = 0; i < size_of(c.tokens * stored) * dim; ++i) before.set(i, random.normal());
        for (size_t i = 0; i < dim * size_of(c.flat ? c.num_heads : 1); ++i) q_norm.set(i, random.normal());
        for (size_t i = 0; i < dim * size_of(c.flat ? c.num_kv_heads : 1); ++i) k_norm.set(i, random.normal());
        for (size_t i = 0; i < bias.size(); ++i) bias[i] = random.normal();
        for (size_t i = 0; i < cosines.size(); ++i) {
            const double angle = 6.28 * random.uniform();
            cosines[i] = static_cast<float>(std::cos(angle));
            sines[i] = static_cast<float>(std::sin(angle));
        }
        reset();
    }

    void reset() {
        std::memcpy(qkv.bytes.data(), before.bytes.data(), before.bytes.size());
        k_cache.bytes.poison();
        v_cache.bytes.poison();
    }

    krasis_cuda_qkv_args args() {
        krasis_cuda_qkv_args a{};
        a.qkv = qkv.bytes.upload();
        a.tokens = c.tokens;
        a.start = c.start;
        a.num_heads = c.num_heads;
        a.num_kv_heads = c.num_kv_heads;
        a.head_dim = c.head_dim;
        a.q_norm = c.with_norm ? q_norm.bytes.upload() : nullptr;
        a.k_norm = c.with_norm ? k_norm.bytes.upload() : nullptr;
        a.dtype = c.dtype;
        a.norm_dtype = c.norm_dtype;
        a.eps = kEps;
        a.norm_kind = c.flat ? KRASIS_CUDA_NORM_FLAT : KRASIS_CUDA_NORM_HEAD;
        a.cos = cosines.upload();
        a.sin = sines.upload();
        a.max_positions = kPositions;
        a.k_cache = k_cache.bytes.upload();
        a.v_cache = v_cache.bytes.upload();
        a.capacity = kCapacity;
        a.bias = c.with_bias ? bias.upload() : nullptr;
        a.rotary_dims = c.rotary_dims;
        a.clip = c.clip;
        a.interleaved = c.interleaved;
        a.shared_kv = c.shared_kv;
        a.value_norm = c.value_norm;
        return a;
    }

    bool is_q(int64_t h) const { return h < c.num_heads; }
    bool is_v(int64_t h) const { return h >= c.num_heads + c.num_kv_heads; }
    int64_t source(int64_t h) const { return c.shared_kv && is_v(h) ? h - c.num_kv_heads : h; }
    size_t at(int64_t t, int64_t h) const { return size_of(t * stored + source(h)) * dim; }

    double biased(int64_t t, int64_t h, size_t i) const {
        return before.get(at(t, h) + i) + (c.with_bias ? double{bias[size_of(source(h)) * dim + i]} : 0.0);
    }

    double mean_square(int64_t t, int64_t h) const {
        const int64_t first = !c.flat ? h : is_q(h) ? 0 : c.num_heads;
        const int64_t count = !c.flat ? 1 : is_q(h) ? c.num_heads : c.num_kv_heads;
        double sum = 0;
        for (int64_t head = first; head < first + count; ++head) {
            for (size_t i = 0; i < dim; ++i) sum += biased(t, head, i) * biased(t, head, i);
        }
        return sum / static_cast<double>(count * c.head_dim);
    }

    // Before the rotation.
    double plain(int64_t t, int64_t h, size_t i, double square) const {
        double value = biased(t, h, i);
        if (c.with_norm && !is_v(h)) {
            const int64_t own = is_q(h) ? h : h - c.num_heads;
            value *= (is_q(h) ? q_norm : k_norm).get(size_of(c.flat ? own : 0) * dim + i) / std::sqrt(square + kEps);
        }
        if (c.value_norm && is_v(h)) value /= std::sqrt(square + kEps);
        return c.clip > 0 ? std::fmin(std::fmax(value, -c.clip), c.clip) : value;
    }

    // What row t must have become, at a position of the given caches. q from the rows.
    void check_row(int64_t t, int64_t position, const Matrix &keys, const Matrix &values) const {
        for (int64_t h = 0; h < heads; ++h) {
            const double square = mean_square(t, h);
            const int64_t kv_head = is_v(h) ? h - c.num_heads - c.num_kv_heads : h - c.num_heads;
            const size_t cell = size_of(kv_head * kCapacity + position) * dim, count = size_of(pairs);
            for (size_t i = 0; i < dim; ++i) {
                double value = plain(t, h, i, square), size = std::fabs(value);
                if (!is_v(h) && i < 2 * count) {
                    const size_t pair = c.interleaved ? i / 2 : i % count;
                    const size_t low = c.interleaved ? 2 * pair : pair, high = c.interleaved ? low + 1 : low + count;
                    const size_t table = size_of(position) * count + pair;
                    const double x = plain(t, h, low, square), y = plain(t, h, high, square);
                    value = i == low ? x * cosines[table] - y * sines[table] : y * cosines[table] + x * sines[table];
                    size = std::fabs(x) + std::fabs(y);
                }
                const double got = is_q(h)   ? qkv.get(at(t, h) + i)
                                   : is_v(h) ? values.get(cell + i)
                                             : keys.get(cell + i);
                CHECK(std::fabs(got - value) <= qkv.rounding() * std::fabs(value) + 2e-6 * size + 0x1p-24);
                if (!is_q(h)) CHECK(qkv.get(at(t, h) + i) == before.get(at(t, h) + i));
            }
        }
    }
};

// The same rows, each with a position and a cache of its own, and one that belongs to nobody: the bits of those that
// ran together.
void check_rows(HeadsProblem &problem, const krasis_cuda_qkv_args &single) {
    const Heads &c = problem.c;
    constexpr size_t kOffset = 64;  // of this layer's part in a slot's memory
    const size_t slot = problem.k_cache.bytes.size() + kOffset, slots = size_of(c.tokens);
    const size_t row_bytes = size_of(problem.stored) * problem.dim * 2;
    const std::vector<uint8_t> expected(problem.qkv.bytes.data(), problem.qkv.bytes.data() + problem.qkv.bytes.size());
    const std::vector<uint8_t> expected_keys(problem.k_cache.bytes.data(),
                                             problem.k_cache.bytes.data() + problem.k_cache.bytes.size());
    Array<uint8_t> keys(slot * slots), values(slot * slots);
    keys.poison();
    values.poison();
    problem.reset();
    Array<krasis_cuda_row> rows(slots);
    uint8_t *key_slots = keys.upload(), *value_slots = values.upload();
    for (size_t t = 0; t < slots; ++t) {
        const size_t own = slots - 1 - t;  // not in the order of the rows
        rows[t] = {c.start + static_cast<int64_t>(t), key_slots + own * slot, value_slots + own * slot};
    }
    const size_t nobody = slots > 2 ? 1 : slots;
    if (nobody < slots) rows[nobody].position = -1;
    auto args = single;
    args.qkv = problem.qkv.bytes.upload();
    args.k_cache = args.v_cache = nullptr;
    args.start = -1;
    args.rows = rows.upload();
    args.keys_offset = args.values_offset = kOffset;
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    problem.qkv.bytes.download();
    keys.download();
    values.download();
    for (size_t t = 0; t < slots; ++t) {
        const bool is_somebody = t != nobody;
        const uint8_t *wanted = is_somebody ? expected.data() : problem.before.bytes.data();
        CHECK(std::memcmp(problem.qkv.bytes.data() + t * row_bytes, wanted + t * row_bytes, row_bytes) == 0);
        const size_t base = (slots - 1 - t) * slot + kOffset;
        for (int64_t h = 0; h < c.num_kv_heads; ++h) {
            for (int64_t position = 0; position < kCapacity; ++position) {
                const size_t cell = size_of(h * kCapacity + position) * problem.dim * 2;
                const bool own = is_somebody && position == c.start + static_cast<int64_t>(t);
                CHECK(own ? std::memcmp(keys.data() + base + cell, expected_keys.data() + cell, problem.dim * 2) == 0
                          : keys[base + cell] == 0xff);
                CHECK((values[base + cell] == 0xff && values[base + cell + 1] == 0xff) != own);
            }
        }
    }
}

void check_heads(const Heads &c) {
    HeadsProblem problem(c);
    auto args = problem.args();
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    for (Matrix *m : {&problem.qkv, &problem.k_cache, &problem.v_cache}) m->bytes.download();
    std::vector<char> stored(size_of(c.num_kv_heads * kCapacity), 0);
    for (int64_t t = 0; t < c.tokens; ++t) {
        problem.check_row(t, c.start + t, problem.k_cache, problem.v_cache);
        for (int64_t h = 0; h < c.num_kv_heads; ++h) stored[size_of(h * kCapacity + c.start + t)] = 1;
    }
    for (size_t cell = 0; cell < stored.size(); ++cell) {
        if (stored[cell]) continue;
        CHECK(std::isnan(problem.k_cache.get(cell * problem.dim)));
        CHECK(std::isnan(problem.v_cache.get((cell + 1) * problem.dim - 1)));
    }
    check_start_on_device(args, c, problem.qkv, problem.before, problem.k_cache, problem.v_cache);
    problem.reset();
    args = problem.args();
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    for (Matrix *m : {&problem.qkv, &problem.k_cache, &problem.v_cache}) m->bytes.download();
    check_rows(problem, args);
}

void check_head_refusals() {
    HeadsProblem problem({2, 0, 4, 2, 64, KRASIS_BF16, KRASIS_F32, true, 64});
    const auto good = problem.args();
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_qk_norm_rope_store(&args, nullptr) == status);
    };
    using Args = krasis_cuda_qkv_args;
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.start = kCapacity - 1; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.head_dim = 528; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.rotary_dims = 66; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.rotary_dims = 31; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.keys_offset = 8; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.norm_kind = 3; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.k_cache = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.cos = nullptr; });
}

}  // namespace

void run_attention_rows() {
    for (int32_t x : kDtypes) {
        for (int32_t out : kDtypes)
            check_rms_norm(x, x == out ? KRASIS_F32 : KRASIS_BF16, out, x == KRASIS_F32 ? 4104 : 768);
    }
    check_heads({5, 0, 4, 2, 128, KRASIS_BF16, KRASIS_BF16, true, 128});
    check_heads({3, 17, 3, 1, 64, KRASIS_F16, KRASIS_F32, true, 64});
    check_heads({1, 9, 2, 2, 256, KRASIS_BF16, KRASIS_F16, true, 256});
    check_heads({2, 0, 2, 1, 80, KRASIS_F16, KRASIS_F16, false, 80});
    // Partial, interleaved and no rotation; biases; flat norms, more heads than warps; cut after the norm.
    check_heads({3, 4, 4, 2, 128, KRASIS_BF16, KRASIS_BF16, true, 64, false, false, true});
    check_heads({3, 4, 2, 1, 64, KRASIS_F16, KRASIS_F32, false, 32, false, true, true});
    check_heads({2, 1, 2, 2, 256, KRASIS_BF16, KRASIS_F32, true, 256, false, true});
    check_heads({2, 1, 2, 1, 48, KRASIS_F16, KRASIS_F32, true, 0});
    check_heads({3, 2, 4, 2, 64, KRASIS_BF16, KRASIS_F32, true, 64, true, false, false, 0.75f});
    // Heads of up to 512 channels; values that are keys, and normed.
    check_heads({3, 4, 2, 1, 512, KRASIS_BF16, KRASIS_BF16, true, 512});
    check_heads({3, 4, 4, 2, 512, KRASIS_BF16, KRASIS_F32, true, 512, false, false, false, 0, true, true});
    check_heads({2, 5, 2, 1, 272, KRASIS_F16, KRASIS_F32, true, 64, false, true, true, 0.9f, true});
    check_heads({3, 2, 4, 2, 64, KRASIS_F16, KRASIS_F32, false, 64, false, false, true, 0, false, true});
    check_heads({4, 2, 40, 10, 32, KRASIS_F16, KRASIS_BF16, true, 16, true, false, true, 1.0f});
    check_heads({2, 3, 3, 3, 32, KRASIS_BF16, KRASIS_F32, false, 32, false, false, true, 0.5f});
    check_head_refusals();
}

}  // namespace test
