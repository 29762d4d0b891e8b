// marlin_reference.h: Marlin weights packed one element at a time by the formulas of docs/FORMAT.md, and their values.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "krasis_cuda.h"
#include "simt.h"

namespace test {

inline double to_double(uint16_t bits, int32_t dtype) {
    return dtype == KRASIS_BF16 ? krasis::bf16_to_float(bits) : krasis::f16_to_float(bits);
}
inline uint16_t to_16(float value, int32_t dtype) {
    return dtype == KRASIS_BF16 ? krasis::bf16_from_float(value) : krasis::f16_from_float(value);
}

// The values of E2M1 codes.
inline constexpr double kE2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

// Weight [k, n], 4 bits: code u = q + 8, or, with scales of type KRASIS_CUDA_E8M0, E2M1.
struct MarlinWeight {
    int64_t k, n, group;
    int32_t scale_dtype;
    std::vector<uint8_t> codes;    // [k, n]
    std::vector<uint16_t> scales;  // [k / group, n]

    MarlinWeight(Random &random, int64_t num_k, int64_t num_n, int64_t group_size, int32_t dtype)
        : k(num_k), n(num_n), group(group_size), scale_dtype(dtype) {
        codes.resize(static_cast<size_t>(k * n));
        for (auto &code : codes) code = static_cast<uint8_t>(random.below(16));
        scales.resize(static_cast<size_t>(k / group * n));
        if (dtype == KRASIS_CUDA_E8M0) {
            for (auto &scale : scales) scale = static_cast<uint16_t>(118 + random.below(10));
            return;
        }
        // Scales of both signs, some zero: the converter searches both, and a group of zeros has no scale.
        for (auto &scale : scales) {
            scale = random.below(50) ? to_16(random.normal() * 0.05f, dtype) : uint16_t{0};
        }
    }

    // Scales of very different sizes, many of them zero; none in a first column.
    void make_wild(Random &random) {
        for (size_t i = 0; i < scales.size(); ++i) {
            if (scale_dtype == KRASIS_CUDA_E8M0) {
                scales[i] = static_cast<uint16_t>(i % 7 ? 107 + random.below(40) : 0);
                continue;
            }
            const auto exponent = static_cast<int>(random.below(41)) - 20;
            const bool zero = random.below(3) == 0 || i % static_cast<size_t>(n) == 0;
            scales[i] = zero ? uint16_t{0} : to_16(std::ldexp(random.below(2) ? 1.25f : -1.5f, exponent), scale_dtype);
        }
    }

    std::vector<double> values() const {
        std::vector<double> all(codes.size());
        for (int64_t i = 0; i < k; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                const auto at = static_cast<size_t>(i * n + j), scale = static_cast<size_t>(i / group * n + j);
                all[at] = scale_dtype == KRASIS_CUDA_E8M0 ? std::ldexp(kE2m1[codes[at]], scales[scale] - 127)
                                                          : (codes[at] - 8) * to_double(scales[scale], scale_dtype);
            }
        }
        return all;
    }

    static int64_t codes_bytes(int64_t k, int64_t n) { return k * n / 2; }
    static int64_t scales_bytes(int64_t k, int64_t n, int64_t group) { return k / group * n * 2; }  // or half of it

    static int64_t word_of(int64_t row, int64_t column, int64_t n) {
        const int64_t r = row % 16, c = column % 16;
        return row / 16 * 2 * n + column / 64 * 128 + (c % 8 * 4 + r % 8 / 2) * 4 + column % 64 / 16;
    }
    static int nibble_of(int64_t row, int64_t column) {
        const int64_t r = row % 16, c = column % 16;
        return static_cast<int>(2 * (c / 8) + r / 8 + 4 * (r % 2));
    }

    void pack_codes(uint32_t *words) const {
        for (int64_t i = 0; i < k * n / 8; ++i) words[i] = 0;
        for (int64_t row = 0; row < k; ++row) {
            for (int64_t column = 0; column < n; ++column) {
                words[word_of(row, column, n)] |= static_cast<uint32_t>(codes[static_cast<size_t>(row * n + column)])
                                                  << (4 * nibble_of(row, column));
            }
        }
    }

    void pack_scales(uint8_t *record) const {
        if (scale_dtype == KRASIS_CUDA_E8M0) {
            for (int64_t i = 0; i < k / group * n; ++i) {
                const auto x = i % 64;
                record[i] = static_cast<uint8_t>(scales[static_cast<size_t>(i - x + x / 8 + 8 * (x % 8))]);
            }
            return;
        }
        auto *out = reinterpret_cast<uint16_t *>(record);
        const bool channel = group == k;
        for (int64_t g = 0; g < k / group; ++g) {
            const uint16_t *in = scales.data() + g * n;
            uint16_t *to = out + g * n;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t x = i % 64, y = i % 32;
                // out[64a + 8i + j] = in[64a + i + 8j];  out[32a + 8i + 2b + e] = in[32a + 8b + 2i + e]
                to[i] = channel ? in[i - y + 8 * (y % 8 / 2) + 2 * (y / 8) + y % 2] : in[i - x + x / 8 + 8 * (x % 8)];
            }
        }
    }
};

}  // namespace test
