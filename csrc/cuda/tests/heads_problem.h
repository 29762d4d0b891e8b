// heads_problem.h: rows of q, k and v on their way to a cache, and what must become of them, in float64.
#pragma once

#include <cmath>

#include "krasis_cuda.h"
#include "matrix.h"

namespace test {

struct Heads {
    int64_t tokens, start, num_heads, num_kv_heads, head_dim;
    int32_t dtype, norm_dtype;
    bool with_norm;
    int64_t rotary_dims;
    bool flat = false, interleaved = false, with_bias = false;
    float clip = 0;
    bool shared_kv = false, value_norm = false;
};

inline constexpr int64_t kCapacity = 24, kPositions = 40;
inline constexpr float kEps = 1e-6f;

inline size_t size_of(int64_t count) { return static_cast<size_t>(count); }

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

    struct Number {
        double value, size;  // size: of its terms
    };

    // What channel i of a head of row t must have become at a position.
    Number expected(int64_t t, int64_t h, size_t i, int64_t position, double square) const {
        const double value = plain(t, h, i, square);
        const size_t count = size_of(pairs);
        if (is_v(h) || i >= 2 * count) return {value, std::fabs(value)};
        const size_t pair = c.interleaved ? i / 2 : i % count;
        const size_t low = c.interleaved ? 2 * pair : pair, high = c.interleaved ? low + 1 : low + count;
        const size_t table = size_of(position) * count + pair;
        const double x = plain(t, h, low, square), y = plain(t, h, high, square);
        return {i == low ? x * cosines[table] - y * sines[table] : y * cosines[table] + x * sines[table],
                std::fabs(x) + std::fabs(y)};
    }

    int64_t kv_head(int64_t h) const { return h - c.num_heads - (is_v(h) ? c.num_kv_heads : 0); }

    // What row t must have become, at a position of the given caches. q from the rows.
    void check_row(int64_t t, int64_t position, const Matrix &keys, const Matrix &values) const {
        for (int64_t h = 0; h < heads; ++h) {
            const double square = mean_square(t, h);
            const size_t cell = size_of(kv_head(h) * kCapacity + position) * dim;
            for (size_t i = 0; i < dim; ++i) {
                const auto [value, size] = expected(t, h, i, position, square);
                const double got = is_q(h)   ? qkv.get(at(t, h) + i)
                                   : is_v(h) ? values.get(cell + i)
                                             : keys.get(cell + i);
                CHECK(std::fabs(got - value) <= qkv.rounding() * std::fabs(value) + 2e-6 * size + 0x1p-24);
                if (!is_q(h)) CHECK(qkv.get(at(t, h) + i) == before.get(at(t, h) + i));
            }
        }
    }
};

}  // namespace test
