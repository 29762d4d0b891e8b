// test_attention_rows.cpp: RMSNorm, and norm, rotation and storing of heads, against float64.
#include <cmath>

#include "heads_problem.h"
#include "suites.h"

namespace test {
namespace {

void check_rms_norm(int32_t x_dtype, int32_t weight_dtype, int32_t out_dtype, int64_t k) {
    Random random(static_cast<uint64_t>(k));
    constexpr int64_t kTokens = 3;
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

// Keys and values in 8 bits, behind them their scales: as near to float64 as half a step, and nothing else is written.
void check_codes(HeadsProblem &problem) {
    const Heads &c = problem.c;
    const size_t rows = size_of(c.num_kv_heads * kCapacity), dim = problem.dim;
    Array<uint8_t> keys(rows * (dim + 4)), values(rows * (dim + 4));
    keys.poison();
    values.poison();
    const std::vector<uint8_t> q(problem.qkv.bytes.data(), problem.qkv.bytes.data() + problem.qkv.bytes.size());
    problem.reset();
    auto args = problem.args();
    args.k_cache = keys.upload();
    args.v_cache = values.upload();
    args.kv_dtype = KRASIS_I8;
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    problem.qkv.bytes.download();
    keys.download();
    values.download();
    CHECK(std::memcmp(problem.qkv.bytes.data(), q.data(), q.size()) == 0);
    for (int64_t h = c.num_heads; h < problem.heads; ++h) {
        Array<uint8_t> &cache = problem.is_v(h) ? values : keys;
        for (int64_t position = 0; position < kCapacity; ++position) {
            const size_t row = size_of(problem.kv_head(h) * kCapacity + position);
            const int64_t t = position - c.start;
            float scale;
            std::memcpy(&scale, cache.data() + rows * dim + 4 * row, 4);
            if (t < 0 || t >= c.tokens) {
                CHECK(std::isnan(scale) && cache[row * dim] == 0xff && cache[row * dim + dim - 1] == 0xff);
                continue;
            }
            const double square = problem.mean_square(t, h);
            double largest = 0, largest_size = 0;
            for (size_t i = 0; i < dim; ++i) {
                const auto [value, size] = problem.expected(t, h, i, position, square);
                const double got = scale * static_cast<int8_t>(cache[row * dim + i]);
                CHECK(std::fabs(got - value) <= 0.5001 * scale + 4e-6 * size);
                largest = std::fmax(largest, std::fabs(value));
                largest_size = std::fmax(largest_size, size);
            }
            CHECK(std::fabs(127 * scale - largest) <= 4e-6 * largest_size);
        }
    }
}

// A head of zeros is zeros; one that holds what is no number has it in its scale.
void check_odd_codes() {
    HeadsProblem problem({1, 3, 1, 1, 64, KRASIS_BF16, KRASIS_F32, false, 64});
    for (size_t i = 0; i < 64; ++i) problem.before.set(64 + i, 0);
    problem.before.set(2 * 64 + 5, NAN);
    problem.reset();
    Array<uint8_t> keys(kCapacity * 68), values(kCapacity * 68);
    auto args = problem.args();
    args.k_cache = keys.upload();
    args.v_cache = values.upload();
    args.kv_dtype = KRASIS_I8;
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    keys.download();
    values.download();
    float scales[2];
    std::memcpy(&scales[0], keys.data() + kCapacity * 64 + 4 * 3, 4);
    std::memcpy(&scales[1], values.data() + kCapacity * 64 + 4 * 3, 4);
    CHECK(scales[0] == 0 && std::isnan(scales[1]));
    for (size_t i = 0; i < 64; ++i) CHECK(keys[3 * 64 + i] == 0);
    args.kv_dtype = KRASIS_BF16;
    CHECK(krasis_cuda_qk_norm_rope_store(&args, nullptr) == KRASIS_ERR_ARGUMENT);
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
    check_codes(problem);
    problem.reset();
    args = problem.args();
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    for (Matrix *m : {&problem.qkv, &problem.k_cache, &problem.v_cache}) m->bytes.download();
    check_start_on_device(args, c, problem.qkv, problem.before, problem.k_cache, problem.v_cache);
    problem.reset();
    args = problem.args();
    CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
    for (Matrix *m : {&problem.qkv, &problem.k_cache, &problem.v_cache}) m->bytes.download();
    check_rows(problem, args);
}

// Tables that 16 bytes at a time cannot read take one warp a head: the same bits.
void check_vectors(const Heads &c) {
    HeadsProblem problem(c);
    Array<float> tables[2]{Array<float>(problem.cosines.size() + 1), Array<float>(problem.sines.size() + 1)};
    std::memcpy(tables[0].data() + 1, problem.cosines.data(), problem.cosines.size() * sizeof(float));
    std::memcpy(tables[1].data() + 1, problem.sines.data(), problem.sines.size() * sizeof(float));
    std::vector<std::vector<uint8_t>> found[2];
    for (const bool by_warps : {false, true}) {
        problem.reset();
        auto args = problem.args();
        if (by_warps) {
            args.cos = tables[0].upload() + 1;
            args.sin = tables[1].upload() + 1;
        }
        CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
        for (Matrix *m : {&problem.qkv, &problem.k_cache, &problem.v_cache}) {
            m->bytes.download();
            found[by_warps].emplace_back(m->bytes.data(), m->bytes.data() + m->bytes.size());
        }
    }
    CHECK(found[0] == found[1]);
}

// In rings lie the bits that a whole cache has, of rows one after another and of rows with places of their own; what
// they do not reach stays as it was.
void check_ring(const Heads &c, bool codes) {
    constexpr int64_t kRing = 8;
    HeadsProblem problem(c);
    const size_t item = codes ? 1 : 2, tail = codes ? 4 : 0, heads = size_of(c.num_kv_heads), dim = problem.dim * item;
    const auto bytes = [&](int64_t places) { return heads * size_of(places) * (dim + tail); };
    const auto run = [&](Array<uint8_t> &keys, Array<uint8_t> &values, int64_t ring, bool by_rows) {
        keys.poison();
        values.poison();
        problem.reset();
        auto args = problem.args();
        args.k_cache = keys.upload();
        args.v_cache = values.upload();
        args.kv_dtype = codes ? KRASIS_I8 : 0;
        args.ring = ring;
        Array<krasis_cuda_row> rows(size_of(c.tokens));
        for (int64_t t = 0; t < c.tokens; ++t) rows[size_of(t)] = {c.start + t, args.k_cache, args.v_cache};
        if (by_rows) args.rows = rows.upload();
        CHECK_OK(krasis_cuda_qk_norm_rope_store(&args, nullptr));
        keys.download();
        values.download();
    };
    Array<uint8_t> keys(bytes(kCapacity)), values(bytes(kCapacity)), ring_keys(bytes(kRing)), ring_values(bytes(kRing));
    run(keys, values, 0, false);
    for (const bool by_rows : {false, true}) {
        run(ring_keys, ring_values, kRing, by_rows);
        for (size_t h = 0; h < heads; ++h) {
            for (int64_t place = 0; place < kRing; ++place) {
                const int64_t first = c.start + (place - c.start % kRing + kRing) % kRing;
                const size_t at = h * kRing + size_of(place), from = h * kCapacity + size_of(first);
                for (auto [found, whole] : {std::pair{&ring_keys, &keys}, std::pair{&ring_values, &values}}) {
                    if (first >= c.start + c.tokens) {
                        CHECK((*found)[at * dim] == 0xff && (*found)[at * dim + dim - 1] == 0xff);
                        continue;
                    }
                    CHECK(std::memcmp(found->data() + at * dim, whole->data() + from * dim, dim) == 0);
                    if (!codes) continue;
                    const uint8_t *scale = found->data() + heads * kRing * dim + 4 * at;
                    CHECK(std::memcmp(scale, whole->data() + heads * kCapacity * dim + 4 * from, 4) == 0);
                }
            }
        }
    }
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
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.ring = -1; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.ring = a.tokens - 1; });
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
    check_heads({3, 4, 2, 1, 96, KRASIS_BF16, KRASIS_F32, true, 96, false, false, true, 0.9f});
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
    check_odd_codes();
    for (int64_t dim : {64, 128, 256, 512}) {
        check_vectors({5, 1, 5, 3, dim, KRASIS_BF16, KRASIS_BF16, true, dim, false, false, true, 0.9f});
        check_vectors({3, 2, 3, 1, dim, KRASIS_F16, KRASIS_F32, true, dim / 4, false, false, false, 0, true, true});
    }
    for (const bool codes : {false, true}) {
        check_ring({5, 13, 2, 2, 64, KRASIS_BF16, KRASIS_F32, true, 64}, codes);
        check_ring({8, 3, 4, 1, 32, KRASIS_F16, KRASIS_F32, true, 16, true}, codes);
    }
    check_head_refusals();
}

}  // namespace test
