// attention_tiles.h: the register tiles of attention (per-ISA header).
//
// Every score and every output element is one chain of fused multiply-adds in order of d (scores) or of the key
// (outputs): the shape of a tile changes which elements are computed together, never their bits.
//
// Scores are computed with rows in the lanes and keys broadcast, so that keys need no transpose (the small matrix of
// scores does); outputs with d in the lanes and weights broadcast. Decode has few rows, and then this is most of the
// time.
#pragma once

#include "attention.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

constexpr int kTileSize = kLanes == 16 ? 12 : 6;  // with 2 registers each, the others hold operands
constexpr int kSlimTileSize = 12;                 // with 1 register each
constexpr int64_t kPanelRows = 2 * kLanes;        // rows of the widest panel of queries

KRASIS_INLINE V8 load8(const float *p) { return V8::load(p); }
KRASIS_INLINE V8 load8(const uint16_t *p) { return V8::load_f16(p); }

// An 8 x 8 transpose: row i of the result is column i of rows.
KRASIS_INLINE void transpose8(V8 (&rows)[8]) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            const __m256 a = pairs[4 * i + j], b = pairs[4 * i + 2 + j];
            quads[4 * i + 2 * j] = _mm256_shuffle_ps(a, b, 0x44);
            quads[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a, b, 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        rows[i].v = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20);
        rows[4 + i].v = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31);
    }
}

// Calls f(std::integral-like constant) for a run-time height in [1, kMax]: tiles are compiled for every height.
template <int kHeight>
struct Height {
    static constexpr int value = kHeight;
};
template <int kMax, class F>
KRASIS_INLINE void with_height(int64_t height, F &&f) {
    if (height == kMax) {
        f(Height<kMax>{});
    } else if constexpr (kMax > 1) {
        with_height<kMax - 1>(height, f);
    }
}

// Rows of a cache that are wanted soon. Tiles fetch their share of it, so that memory works under the arithmetic.
struct Ahead {
    const void *rows = nullptr;  // [count][row_bytes]
    int64_t count = 0, row_bytes = 0;
    KRASIS_INLINE void fetch(int64_t first, int64_t size) const {
        const int64_t last = first + size < count ? first + size : count;
        const char *from = static_cast<const char *>(rows);
        for (int64_t byte = first * row_bytes; byte < last * row_bytes; byte += 64) {
            _mm_prefetch(from + byte, _MM_HINT_T0);
        }
    }
};

// Cuts count into tiles of nearly equal size, at most kMax; f(first, size).
template <int kMax, class F>
KRASIS_INLINE void for_tiles(int64_t count, F &&f) {
    const int64_t tiles = (count + kMax - 1) / kMax;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = count * tile / tiles;
        f(first, count * (tile + 1) / tiles - first);
    }
}

// scores [kKeys][kVectors * lanes] = keys [kKeys][kStride] x queries [dim][kVectors * lanes].
template <class T, int kVectors, int kKeys, int kStride>
void score_tile(const float *queries, const float *keys, int64_t dim, float *scores) {
    constexpr int kWidth = kVectors * T::kSize;
    T sums[kKeys][kVectors];
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[key][v] = T::zero();
    }
    for (int64_t d = 0; d < dim; ++d) {
        T q[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) q[v] = T::load(queries + d * kWidth + v * T::kSize);
#pragma GCC unroll 16
        for (int key = 0; key < kKeys; ++key) {
            const T x = T::set1(keys[key * kStride + d]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[key][v] = fma(x, q[v], sums[key][v]);
        }
    }
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[key][v].store(scores + key * kWidth + v * T::kSize);
    }
}

// Scores of one panel of kVectors * lanes rows with all keys, written to scores [rows][kBlockKeys].
template <class T, int kVectors, int kStride>
void score_panel(const float *queries, const float *keys, int64_t num_keys, int64_t dim, const Ahead &ahead,
                 float *scores) {
    constexpr int kWidth = kVectors * T::kSize;
    constexpr int kMax = kVectors == 2 ? kTileSize : kSlimTileSize;
    alignas(64) float by_key[kBlockKeys * kWidth];
    for_tiles<kMax>(num_keys, [&](int64_t first, int64_t size) {
        with_height<kMax>(size, [&](auto height) {
            score_tile<T, kVectors, decltype(height)::value, kStride>(queries, keys + first * kStride, dim,
                                                                      by_key + first * kWidth);
        });
        ahead.fetch(first, size);
    });
    for (int64_t key = 0; key < num_keys; key += 8) {  // what lies beyond num_keys is masked by the caller
        for (int row = 0; row < kWidth; row += 8) {
            V8 block[8];
            for (int i = 0; i < 8; ++i) block[i] = V8::load(by_key + (key + i) * kWidth + row);
            transpose8(block);
            for (int i = 0; i < 8; ++i) block[i].store(scores + (row + i) * kBlockKeys + key);
        }
    }
}

// Width of the panel that begins with `rows` rows left: the widest that is not mostly padding.
KRASIS_INLINE int64_t panel_width(int64_t rows) {
    if (rows > kPanelRows - 8) return kPanelRows;
    return rows > kLanes - 8 ? kLanes : 8;
}

// out [kRows][dim], kVectors registers wide, += p [kRows][kBlockKeys] x values [num_keys][stride].
template <int kRows, int kVectors>
void value_tile(const float *p, const float *values, int64_t stride, int64_t num_keys, int64_t dim, float *out) {
    V sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = V::load(out + r * dim + v * kLanes);
    }
    for (int64_t key = 0; key < num_keys; ++key, values += stride) {
        V x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = V::load(values + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const V weight = V::set1(p[r * kBlockKeys + key]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(weight, x[v], sums[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v].store(out + r * dim + v * kLanes);
    }
}

// Values of a block of keys: the first of [num_keys][stride] floats.
struct Values {
    const float *data;
    int64_t stride;
};

// out [rows][dim] += p [rows][kBlockKeys] x values [num_keys][dim].
KRASIS_INLINE void add_values(int64_t rows, const float *p, Values values, int64_t num_keys, int64_t dim,
                              const Ahead &ahead, float *out) {
    for_tiles<kTileSize>(rows, [&](int64_t first, int64_t size) {
        const float *weights = p + first * kBlockKeys;
        float *to = out + first * dim;
        with_height<kTileSize>(size, [&](auto height) {
            constexpr int kRows = decltype(height)::value;
            int64_t d = 0;
            for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
                value_tile<kRows, 2>(weights, values.data + d, values.stride, num_keys, dim, to + d);
                if (first == 0) ahead.fetch(ahead.count * d / dim, (ahead.count * 2 * kLanes + dim - 1) / dim);
            }
            if (d < dim) value_tile<kRows, 1>(weights, values.data + d, values.stride, num_keys, dim, to + d);
        });
    });
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
