// gated_delta_scan.cuh: the gated delta rule chunk after chunk; gated_delta_chunk.cuh has the formulas and what a chunk
// needs of itself.
//
// A block takes 32 columns of a head's matrix through all chunks. The matrix stays in registers as sums of products, 16
// rows a warp, and is rounded to 16 bits where it is a factor. Of what a chunk reads, each part is fetched as soon as
// the place of the one before is free; what is needed last has two places. All of it fits in the 99 KiB that every GPU
// has.
#pragma once

#include "gated_delta_chunk.cuh"

namespace krasis::cuda {

inline constexpr int kScanColumns = 32, kNarrowUnits = kScanColumns / 8;
inline constexpr int kNarrowBytes = kChunk * kScanColumns * 2, kMatrixBytes = kMaxDeltaDim * kScanColumns * 2;

// Places in shared memory.
struct ScanMemory {
    uint8_t *base;
    KRASIS_DEVICE uint8_t *k(int64_t chunk) const { return base + chunk % 2 * kWideBytes; }
    KRASIS_DEVICE uint8_t *q() const { return base + 2 * kWideBytes; }
    KRASIS_DEVICE uint8_t *seen(int64_t chunk) const { return base + 3 * kWideBytes + chunk % 2 * kSquareBytes; }
    KRASIS_DEVICE uint8_t *inverse() const { return base + 3 * kWideBytes + 2 * kSquareBytes; }
    KRASIS_DEVICE uint8_t *narrow(int i) const { return base + 3 * kWideBytes + 3 * kSquareBytes + i * kNarrowBytes; }
    KRASIS_DEVICE uint8_t *v() const { return narrow(0); }
    KRASIS_DEVICE uint8_t *missing() const { return narrow(1); }  // b (v - exp(g) k S)
    KRASIS_DEVICE uint8_t *added() const { return narrow(2); }    // V
    KRASIS_DEVICE uint8_t *kept() const { return narrow(3); }     // exp(g_last - g) V
    KRASIS_DEVICE uint8_t *matrix() const { return narrow(4); }
    KRASIS_DEVICE float *decays(int64_t chunk) const {
        return reinterpret_cast<float *>(matrix() + kMatrixBytes + chunk % 2 * kDecayBytes);
    }
};
inline constexpr size_t kScanShared =
    3 * kWideBytes + 3 * kSquareBytes + 4 * kNarrowBytes + kMatrixBytes + 2 * kDecayBytes;
static_assert(kScanShared <= 99 * 1024);

// What a block copies of each chunk.
struct ScanSource {
    const DeltaSegment &s;
    ScanMemory memory;
    int64_t head, column;

    KRASIS_DEVICE const uint16_t *row(int64_t chunk, int64_t channel) const {
        return static_cast<const uint16_t *>(s.args.mixed) + (s.first + chunk * kChunk) * delta_channels(s.args) +
               channel;
    }
    KRASIS_DEVICE int64_t key_channel() const {
        return head / (s.args.value_heads / s.args.key_heads) * s.args.key_dim;
    }
    KRASIS_DEVICE void square(uint8_t *tile, const uint8_t *from) const {
        fetch_rows<kSquareUnits, kDeltaThreads>(tile, from, kChunk, kChunk, kChunk);
    }

    KRASIS_DEVICE void fetch_k(int64_t chunk) const {
        if (chunk >= s.chunks) return;
        const auto &p = s.args;
        fetch_rows<kWideUnits, kDeltaThreads>(memory.k(chunk), row(chunk, p.key_heads * p.key_dim + key_channel()),
                                              delta_channels(p), chunk_rows(s, chunk), static_cast<int>(p.key_dim));
        square(memory.seen(chunk), chunk_memory(s, chunk, head) + kSquareBytes);
    }
    KRASIS_DEVICE void fetch_q(int64_t chunk) const {
        if (chunk >= s.chunks) return;
        const auto &p = s.args;
        const int count = chunk_rows(s, chunk);
        fetch_rows<kWideUnits, kDeltaThreads>(memory.q(), row(chunk, key_channel()), delta_channels(p), count,
                                              static_cast<int>(p.key_dim));
        const int64_t left = p.value_dim - column;
        fetch_rows<kNarrowUnits, kDeltaThreads>(
            memory.v(), row(chunk, 2 * p.key_heads * p.key_dim + head * p.value_dim + column), delta_channels(p), count,
            left < kScanColumns ? static_cast<int>(left) : kScanColumns);
        const uint8_t *decays = chunk_memory(s, chunk, head) + 2 * kSquareBytes;
        for (int i = static_cast<int>(simt::thread_x()) * 16; i < kDecayBytes; i += kDeltaThreads * 16) {
            simt::cp_async16(reinterpret_cast<uint8_t *>(memory.decays(chunk)) + i, decays + i, true);
        }
    }
    KRASIS_DEVICE void fetch_inverse(int64_t chunk) const {
        if (chunk < s.chunks) square(memory.inverse(), chunk_memory(s, chunk, head));
    }
};

// Four 8-column tiles of 16 rows.
using ScanTiles = float[4][4];

template <class Type>
struct Scan {
    const DeltaSegment &s;
    ScanMemory memory;
    int64_t head, column;  // the first of the block's
    int lane, warp, key_dim;

    // Rows and columns of the elements of a lane's tiles.
    KRASIS_DEVICE int row(int half) const { return lane / 4 + 8 * half; }
    KRASIS_DEVICE int at(int n) const { return 8 * n + lane % 4 * 2; }
    KRASIS_DEVICE bool holds() const { return 16 * warp < key_dim; }
    KRASIS_DEVICE bool exists(int n) const { return column + 8 * n < s.args.value_dim; }

    KRASIS_DEVICE float *matrix_cell(int n, int half) const {
        const int64_t tiles = s.args.value_dim / kDeltaTile, tile = (column + 8 * n) / kDeltaTile;
        return s.args.matrices + ((head * tiles + tile) * key_dim + 16 * warp + row(half)) * kDeltaTile +
               (column + at(n)) % kDeltaTile;
    }
    KRASIS_DEVICE void load_matrix(ScanTiles &tiles) const {
        const bool is_zero = s.first == 0 && s.args.start == 0;
        KRASIS_UNROLL
        for (int n = 0; n < 4; ++n) {
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                const bool reads = holds() && exists(n) && !is_zero;
                const float *cell = reads ? matrix_cell(n, half) : nullptr;
                tiles[n][2 * half] = reads ? cell[0] : 0.0f;
                tiles[n][2 * half + 1] = reads ? cell[1] : 0.0f;
            }
        }
    }
    KRASIS_DEVICE void store_matrix(const ScanTiles &tiles) const {
        KRASIS_UNROLL
        for (int n = 0; n < 4; ++n) {
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (!holds() || !exists(n)) continue;
                float *cell = matrix_cell(n, half);
                cell[0] = tiles[n][2 * half];
                cell[1] = tiles[n][2 * half + 1];
            }
        }
    }

    // Two values of the tile, rounded.
    KRASIS_DEVICE void put(uint8_t *tile, int first, int n, int half, float low, float high) const {
        simt::shared_store(tile_cell<kNarrowUnits>(tile, first + row(half), at(n)), pack2<Type>(low, high));
    }
    KRASIS_DEVICE void round_matrix(const ScanTiles &tiles) const {
        if (!holds()) return;
        KRASIS_UNROLL
        for (int n = 0; n < 4; ++n) {
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                put(memory.matrix(), 16 * warp, n, half, tiles[n][2 * half], tiles[n][2 * half + 1]);
            }
        }
    }

    // sums += left x right [16, 32].
    KRASIS_DEVICE void multiply(ScanTiles &sums, const uint32_t (&left)[4], uint8_t *right, int first) const {
        KRASIS_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
            uint32_t b[2][2];
            right_tiles<kNarrowUnits>(b, right, first, 16 * pair, lane);
            simt::mma(Type{}, sums[2 * pair], left, b[0]);
            simt::mma(Type{}, sums[2 * pair + 1], left, b[1]);
        }
    }

    // k S by the first four warps, q S by the others, 16 rows each.
    KRASIS_DEVICE void recall(ScanTiles &sums, int64_t chunk) const {
        uint8_t *rows = warp < 4 ? memory.k(chunk) : memory.q();
        KRASIS_UNROLL
        for (int step = 0; step < kMaxDeltaDim; step += 16) {
            if (step >= key_dim) continue;
            uint32_t left[4];
            left_tile<kWideUnits>(left, rows, 16 * (warp % 4), step, lane);
            multiply(sums, left, memory.matrix(), step);
        }
    }

    // b (v - exp(g) k S).
    KRASIS_DEVICE void put_missing(const ScanTiles &recalled, int64_t chunk) const {
        const float *decays = memory.decays(chunk);
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = 16 * warp + row(half);
            const float decay = simt::exp_float(simt::shared_load<float>(decays + i));
            const float step = simt::shared_load<float>(decays + kChunk + i);
            KRASIS_UNROLL
            for (int n = 0; n < 4; ++n) {
                const auto v = simt::shared_load<uint32_t>(tile_cell<kNarrowUnits>(memory.v(), i, at(n)));
                const float low = Type::to_float(static_cast<uint16_t>(v));
                const float high = Type::to_float(static_cast<uint16_t>(v >> 16));
                put(memory.missing(), 16 * warp, n, half,
                    step * simt::fused_multiply_add(-decay, recalled[n][2 * half], low),
                    step * simt::fused_multiply_add(-decay, recalled[n][2 * half + 1], high));
            }
        }
    }

    // V, as it is and as it is left behind the chunk; a warp has 16 rows of 16 columns.
    KRASIS_DEVICE void put_added(int64_t chunk) const {
        const int first = 16 * (warp % 4), pair = warp / 4;
        float sums[2][4] = {};
        KRASIS_UNROLL
        for (int step = 0; step < kChunk; step += 16) {
            if (step > first) continue;  // above the diagonal
            uint32_t left[4], b[2][2];
            left_tile<kSquareUnits>(left, memory.inverse(), first, step, lane);
            right_tiles<kNarrowUnits>(b, memory.missing(), step, 16 * pair, lane);
            simt::mma(Type{}, sums[0], left, b[0]);
            simt::mma(Type{}, sums[1], left, b[1]);
        }
        const float *decays = memory.decays(chunk);
        const float last = simt::shared_load<float>(decays + kChunk - 1);
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float left = simt::exp_float(last - simt::shared_load<float>(decays + first + row(half)));
            KRASIS_UNROLL
            for (int n = 0; n < 2; ++n) {
                const float low = sums[n][2 * half], high = sums[n][2 * half + 1];
                put(memory.added(), first, 2 * pair + n, half, low, high);
                put(memory.kept(), first, 2 * pair + n, half, left * low, left * high);
            }
        }
    }

    // exp(g) q S + A V, by the warps that have q S.
    KRASIS_DEVICE void put_out(ScanTiles &sums, int64_t chunk) const {
        const int first = 16 * (warp - 4), count = chunk_rows(s, chunk);
        const float *decays = memory.decays(chunk);
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float decay = simt::exp_float(simt::shared_load<float>(decays + first + row(half)));
            KRASIS_UNROLL
            for (int n = 0; n < 4; ++n) {
                sums[n][2 * half] *= decay;
                sums[n][2 * half + 1] *= decay;
            }
        }
        KRASIS_UNROLL
        for (int step = 0; step < kChunk; step += 16) {
            if (step > first) continue;  // above the diagonal
            uint32_t left[4];
            left_tile<kSquareUnits>(left, memory.seen(chunk), first, step, lane);
            multiply(sums, left, memory.added(), step);
        }
        const int64_t values = s.args.value_heads * s.args.value_dim;
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = first + row(half);
            if (i >= count) continue;
            auto *to = static_cast<uint16_t *>(s.args.out) + (s.first + chunk * kChunk + i) * values +
                       head * s.args.value_dim + column;
            KRASIS_UNROLL
            for (int n = 0; n < 4; ++n) {
                if (!exists(n)) continue;
                *reinterpret_cast<uint32_t *>(to + at(n)) = pack2<Type>(sums[n][2 * half], sums[n][2 * half + 1]);
            }
        }
    }

    KRASIS_DEVICE void update(ScanTiles &matrix, int64_t chunk) const {
        const float decay = simt::exp_float(simt::shared_load<float>(memory.decays(chunk) + kChunk - 1));
        KRASIS_UNROLL
        for (int n = 0; n < 4; ++n) {
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) matrix[n][i] *= decay;
        }
        KRASIS_UNROLL
        for (int step = 0; step < kChunk; step += 16) {
            uint32_t left[4];
            left_tile_transposed<kWideUnits>(left, memory.k(chunk), step, 16 * warp, lane);
            multiply(matrix, left, memory.kept(), step);
        }
    }
};

template <class Type>
KRASIS_KERNEL(kDeltaThreads, 1)
delta_scan_kernel(const DeltaSegment s) {
    const int64_t tiles = (s.args.value_dim + kScanColumns - 1) / kScanColumns;
    const int64_t head = simt::block_x() / tiles, column = simt::block_x() % tiles * kScanColumns;
    const ScanMemory memory{simt::shared_memory()};
    const ScanSource source{s, memory, head, column};
    const Scan<Type> scan{s,
                          memory,
                          head,
                          column,
                          static_cast<int>(simt::thread_x() % simt::kWarp),
                          static_cast<int>(simt::thread_x() / simt::kWarp),
                          static_cast<int>(s.args.key_dim)};
    source.fetch_k(0);
    source.fetch_q(0);
    simt::cp_async_commit();
    source.fetch_inverse(0);
    simt::cp_async_commit();
    ScanTiles matrix;
    scan.load_matrix(matrix);
    KRASIS_UNROLL_BY(1)
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        scan.round_matrix(matrix);
        simt::cp_async_wait<1>();  // all but the inverse
        simt::sync_threads();
        source.fetch_k(chunk + 1);
        simt::cp_async_commit();
        ScanTiles recalled = {};
        scan.recall(recalled, chunk);
        if (scan.warp < 4) scan.put_missing(recalled, chunk);
        simt::cp_async_wait<1>();  // the inverse
        simt::sync_threads();
        source.fetch_q(chunk + 1);
        simt::cp_async_commit();
        scan.put_added(chunk);
        simt::sync_threads();
        source.fetch_inverse(chunk + 1);
        simt::cp_async_commit();
        if (scan.warp >= 4) scan.put_out(recalled, chunk);
        if (scan.holds()) scan.update(matrix, chunk);
    }
    scan.store_matrix(matrix);
}

// The gated norm of a head of a row, in place, by a warp.
KRASIS_KERNEL(kDeltaThreads, 1)
delta_norm_kernel(const krasis_cuda_gated_delta_args p) {
    constexpr int kPairs = kMaxDeltaDim / (2 * simt::kWarp);
    const int lane = static_cast<int>(simt::thread_x() % simt::kWarp);
    const int64_t item =
        static_cast<int64_t>(simt::block_x()) * (kDeltaThreads / simt::kWarp) + simt::thread_x() / simt::kWarp;
    if (item >= p.tokens * p.value_heads) return;  // the whole warp
    const int64_t row = item / p.value_heads, head = item % p.value_heads;
    const int dim = static_cast<int>(p.value_dim);
    auto *out = static_cast<uint16_t *>(p.out) + item * dim;
    float values[kPairs][2], square = 0;
    KRASIS_UNROLL
    for (int m = 0; m < kPairs; ++m) {
        const int at = 2 * (lane + simt::kWarp * m);
        values[m][0] = values[m][1] = 0;
        if (at < dim) load_pair(out, at, p.dtype, values[m]);
        square = simt::fused_multiply_add(values[m][0], values[m][0], square);
        square = simt::fused_multiply_add(values[m][1], values[m][1], square);
    }
    const float scale = simt::reciprocal_sqrt(lane_sum(square, 1, 16) / static_cast<float>(dim) + p.eps);
    KRASIS_UNROLL
    for (int m = 0; m < kPairs; ++m) {
        const int at = 2 * (lane + simt::kWarp * m);
        if (at >= dim) continue;
        float z[2];
        load_pair(p.x, row * delta_columns(p) + delta_channels(p) + head * dim + at, p.dtype, z);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            values[m][i] *= scale * load1(p.gate_norm, at + i, p.norm_dtype) * delta_gate(p, z[i]);
        }
        *reinterpret_cast<uint32_t *>(out + at) = pack_pair(p.dtype, values[m][0], values[m][1]);
    }
}

}  // namespace krasis::cuda
