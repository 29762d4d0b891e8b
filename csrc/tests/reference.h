// reference.h: plain scalar forms of what the kernels compute, from the descriptions in krasis.h and docs/FORMAT.md.
#pragma once

#include <algorithm>
#include <cmath>

#include "test.h"

namespace test {

inline float half_to_float(uint16_t h) {
    const int exponent = (h >> 10) & 31, mantissa = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

inline float bfloat_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Quantised activations [tokens, k] with their storage.
struct Acts {
    Buffer<int8_t> q;
    Buffer<float> scale;
    Buffer<int32_t> sum;
    int64_t tokens, k;

    Acts(Random &random, int64_t num_tokens, int64_t size)
        : q(num_tokens * size),
          scale(num_tokens * size / 32),
          sum(num_tokens * size / 32),
          tokens(num_tokens),
          k(size) {
        for (int8_t &code : q) code = static_cast<int8_t>(random.between(-127, 127));
        if (!q.empty()) std::fill_n(q.begin(), 32, random.below(2) ? 127 : -127);  // the extreme sums
        for (float &s : scale) s = static_cast<float>(random.uniform() * 0.02);
        for (size_t b = 0; b < sum.size(); ++b) {
            for (int i = 0; i < 32; ++i) sum[b] += q[b * 32 + i];
        }
    }
    // Rows [first, first + count) as an argument.
    krasis_acts view(int64_t first, int64_t count) {
        return {q.data() + first * k, scale.data() + first * (k / 32), sum.data() + first * (k / 32), count, k};
    }
    double value(int64_t row, int64_t i) const {
        return q[row * k + i] * static_cast<double>(scale[(row * k + i) / 32]);
    }
};

// The element every strip kernel computes: block sums as exact integers, then one fma a block.
template <class Code, class Scale>
float strip_element(const Acts &acts, int64_t row, Code code, Scale weight_scale) {
    float acc = 0;
    for (int64_t b = 0; b < acts.k / 32; ++b) {
        int32_t sum = 0;
        for (int64_t i = b * 32; i < b * 32 + 32; ++i) sum += acts.q[row * acts.k + i] * code(i);
        const float scale = acts.scale[row * (acts.k / 32) + b];
        acc = std::fma(static_cast<float>(sum), weight_scale(b, scale), acc);
    }
    return acc;
}

// A weight [n, k] in CPU tiles.
struct Tiles {
    int32_t format;
    int64_t n, k;
    uint8_t *data;

    int64_t tile_bytes() const {
        if (format == KRASIS_TILES_MXFP4) return KRASIS_MXFP4_TILE_BYTES;
        return format == KRASIS_TILES_Q8 ? KRASIS_Q8_TILE_BYTES : KRASIS_I4_TILE_BYTES;
    }
    int64_t bytes() const { return n / 32 * (k / 32) * tile_bytes(); }
    const uint8_t *tile(int64_t row, int64_t i) const { return data + (row / 32 * (k / 32) + i / 32) * tile_bytes(); }
    int code(int64_t row, int64_t i) const {
        const int64_t r = row % 32, k4 = i % 32 / 4, in = i % 4;
        if (format == KRASIS_TILES_Q8) return static_cast<int8_t>(tile(row, i)[k4 * 128 + r * 4 + in]);
        const uint8_t both = tile(row, i)[k4 * 64 + r % 16 * 4 + in];
        const int nibble = r < 16 ? both & 15 : both >> 4;
        if (format == KRASIS_TILES_I4) return nibble - 8;
        constexpr int kTwice[8] = {0, 1, 2, 3, 4, 6, 8, 12};  // of MXFP4, whose scale is then half
        return nibble < 8 ? kTwice[nibble] : -kTwice[nibble - 8];
    }
    float scale(int64_t row, int64_t i) const {
        if (format == KRASIS_TILES_MXFP4) return std::ldexp(1.0f, tile(row, i)[512 + row % 32] - 128);
        uint16_t half;
        std::memcpy(&half, tile(row, i) + tile_bytes() - 64 + row % 32 * 2, sizeof half);
        return half_to_float(half);
    }
    // Random codes (all values, -128 too) and scales of about 2^-7; of MXFP4 some of denormal numbers too.
    void fill(Random &random) const {
        for (int64_t at = 0; at < bytes(); ++at) data[at] = static_cast<uint8_t>(random.next());
        for (int64_t t = 0; t < n / 32 * (k / 32); ++t) {
            for (int r = 0; r < 32; ++r) {
                if (format == KRASIS_TILES_MXFP4) {
                    const int64_t e = random.below(32) ? 117 + random.below(6) : random.below(4);
                    data[t * tile_bytes() + 512 + r] = static_cast<uint8_t>(e);
                    continue;
                }
                const uint16_t half = static_cast<uint16_t>(0x1c00 + random.below(0x800) + (random.below(2) << 15));
                std::memcpy(data + (t + 1) * tile_bytes() - 64 + r * 2, &half, sizeof half);
            }
        }
    }
};

}  // namespace test
