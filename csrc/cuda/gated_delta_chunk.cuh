// gated_delta_chunk.cuh: what a chunk of 64 rows of a sequence needs of itself alone, all chunks at once.
//
// With g the sums of the decays' logarithms inside a chunk, row i is decayed by exp(g_i - g_j) since row j. What a row
// adds to the matrix depends on what those before it in the chunk add: a unit lower triangular system, of which this
// keeps the inverse T. Of what the rows add, each query then sees A. With the matrix S before the chunk
// (gated_delta_scan.cuh goes on from here):
//     L_ij = b_i exp(g_i - g_j) k_i . k_j (i > j)       T = (I + L)^-1
//     A_ij = exp(g_i - g_j) q_i . k_j (i >= j)
//     V = T b (v - exp(g) k S);  o = exp(g) q S + A V;  S' = exp(g_last) S + (exp(g_last - g) k)^T V
#pragma once

#include "gated_delta.cuh"

namespace krasis::cuda {

inline constexpr int kChunk = 64, kChunkThreads = 128;
inline constexpr int kWideUnits = kMaxDeltaDim / 8, kSquareUnits = kChunk / 8;  // of 16 bytes in a row
inline constexpr int kWideBytes = kChunk * kMaxDeltaDim * 2, kSquareBytes = kChunk * kChunk * 2;
inline constexpr int kDecayBytes = 2 * kChunk * 4;
// Of a head of a chunk: T and A of the rows' type, g and b in fp32.
inline constexpr int kChunkBytes = 2 * kSquareBytes + kDecayBytes;
static_assert(kChunkBytes == KRASIS_CUDA_DELTA_CHUNK_BYTES && kChunk == KRASIS_CUDA_DELTA_CHUNK);

// Consecutive chunks of a sequence. begins: they begin with its first row.
struct DeltaSegment {
    krasis_cuda_gated_delta_args args;
    int64_t first, chunks;  // the first row, counted from the call's
};

// Rows of units of 16 bytes in shared memory, so that eight rows' equal columns lie in different banks. column: of
// 16-bit elements.
template <int kUnits>
KRASIS_DEVICE uint8_t *tile_cell(uint8_t *tile, int row, int column) {
    const int unit = column / 8;
    const int at = kUnits == 4 ? unit ^ (row / 2 % 4) : (unit & ~7) | ((unit ^ row) & 7);
    return tile + (row * kUnits + at) * 16 + column % 8 * 2;
}

// Starts copying rows [64, columns] that lie stride elements apart; those from count on are cleared. A thread's rows
// have their unit in the same place: each address is the one before and a constant.
template <int kUnits, int kThreads>
KRASIS_DEVICE void fetch_rows(uint8_t *tile, const void *from, int64_t stride, int count, int columns) {
    constexpr int kStep = kThreads / kUnits;
    static_assert(kStep % 8 == 0 && kChunk % kStep == 0);
    const int thread = static_cast<int>(simt::thread_x()), first = thread / kUnits, unit = thread % kUnits;
    const auto *begin = static_cast<const uint16_t *>(from), *source = begin + first * stride + unit * 8;
    uint8_t *cell = tile_cell<kUnits>(tile, first, unit * 8);
    KRASIS_UNROLL
    for (int row = 0; row < kChunk; row += kStep) {
        const bool valid = first + row < count && unit * 8 < columns;
        simt::cp_async16(cell + row * kUnits * 16, valid ? source : begin, valid);
        source += kStep * stride;
    }
}

KRASIS_DEVICE uint8_t *chunk_memory(const DeltaSegment &s, int64_t chunk, int64_t head) {
    return static_cast<uint8_t *>(s.args.chunks) + (chunk * s.args.value_heads + head) * kChunkBytes;
}

KRASIS_DEVICE int chunk_rows(const DeltaSegment &s, int64_t chunk) {
    const int64_t left = s.args.tokens - s.first - chunk * kChunk;
    return left < kChunk ? static_cast<int>(left) : kChunk;
}

// Fragments of a 16 x 16 tile of rows and columns of a product's left side, and of two 8-column tiles of its right one.
template <int kUnits>
KRASIS_DEVICE void left_tile(uint32_t (&a)[4], uint8_t *tile, int row, int column, int lane) {
    simt::ldmatrix_x4(a, tile_cell<kUnits>(tile, row + lane % 16, column + lane / 16 * 8));
}
// Where memory has the transposed left side, and the column of the product is a row of memory.
template <int kUnits>
KRASIS_DEVICE void left_tile_transposed(uint32_t (&a)[4], uint8_t *tile, int row, int column, int lane) {
    simt::ldmatrix_x4_transposed(a, tile_cell<kUnits>(tile, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}
template <int kUnits>
KRASIS_DEVICE void right_tiles(uint32_t (&b)[2][2], uint8_t *tile, int row, int column, int lane) {
    uint32_t r[4];
    simt::ldmatrix_x4_transposed(r, tile_cell<kUnits>(tile, row + lane % 16, column + lane / 16 * 8));
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
}
template <int kUnits>
KRASIS_DEVICE void right_tiles_transposed(uint32_t (&b)[2][2], uint8_t *tile, int row, int column, int lane) {
    uint32_t r[4];
    simt::ldmatrix_x4(r, tile_cell<kUnits>(tile, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
}

// Sums of the decays' logarithms, and the steps, of a chunk's rows: by the first warp, to shared and global memory.
KRASIS_DEVICE void chunk_decays(const krasis_cuda_gated_delta_args &p, int64_t first, int count, int64_t head, int lane,
                                float *shared, float *global) {
    float logs[2], steps[2];
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        const bool exists = 2 * lane + i < count;
        const float *gates = p.gates + (first + (exists ? 2 * lane + i : 0)) * 2 * p.value_heads;
        steps[i] = exists ? gates[head] : 0.0f;
        logs[i] = exists ? gates[p.value_heads + head] : 0.0f;
    }
    float total = logs[0] + logs[1];
    for (int distance = 1; distance < simt::kWarp; distance *= 2) {
        const float before = simt::shuffle_up(total, distance);
        if (lane >= distance) total += before;
    }
    const float sums[2] = {total - logs[1], total};
    KRASIS_UNROLL
    for (int i = 0; i < 2; ++i) {
        simt::shared_store(shared + 2 * lane + i, sums[i]);
        simt::shared_store(shared + kChunk + 2 * lane + i, steps[i]);
        global[2 * lane + i] = sums[i];
        global[kChunk + 2 * lane + i] = steps[i];
    }
}

// One column of T by a thread, from the top: (I + L) T = I. system: L, fp32 [64, 64].
template <class Type>
KRASIS_DEVICE void solve_column(const float *system, uint16_t *inverse, int column) {
    float x[kChunk];
    KRASIS_UNROLL
    for (int i = 0; i < kChunk; ++i) {
        float sums[4] = {i == column ? 1.0f : 0.0f, 0, 0, 0};  // four chains
        KRASIS_UNROLL
        for (int j = 0; j < i; j += 4) {
            const auto words = simt::shared_load<simt::Words4>(system + i * kChunk + j);
            KRASIS_UNROLL
            for (int m = 0; m < 4; ++m) {
                if (j + m < i) sums[m] = simt::fused_multiply_add(-bits_float(words.w[m]), x[j + m], sums[m]);
            }
        }
        x[i] = sums[0] + sums[1] + (sums[2] + sums[3]);
        inverse[i * kChunk + column] = Type::from_float(x[i]);
    }
}

// A block takes a head of a chunk, a warp 16 rows of it. shared: k, q (then L), g and b.
template <class Type>
KRASIS_KERNEL(kChunkThreads, 3)
delta_chunk_kernel(const DeltaSegment s) {
    const krasis_cuda_gated_delta_args &p = s.args;
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % simt::kWarp, warp = thread / simt::kWarp;
    const int64_t chunk = simt::block_x() / p.value_heads, head = simt::block_x() % p.value_heads;
    const int64_t first = s.first + chunk * kChunk, channels = delta_channels(p);
    const int count = chunk_rows(s, chunk), key_dim = static_cast<int>(p.key_dim);
    uint8_t *k = simt::shared_memory(), *q = k + kWideBytes, *own = chunk_memory(s, chunk, head);
    auto *system = reinterpret_cast<float *>(q), *sums = reinterpret_cast<float *>(q + kWideBytes);
    const auto *rows =
        static_cast<const uint16_t *>(p.mixed) + first * channels + head / (p.value_heads / p.key_heads) * p.key_dim;
    fetch_rows<kWideUnits, kChunkThreads>(k, rows + p.key_heads * p.key_dim, channels, count, key_dim);
    fetch_rows<kWideUnits, kChunkThreads>(q, rows, channels, count, key_dim);
    simt::cp_async_commit();
    if (warp == 0) {
        chunk_decays(p, first, count, head, lane, sums, reinterpret_cast<float *>(own + 2 * kSquareBytes));
    }
    simt::cp_async_wait<0>();
    simt::sync_threads();
    float of_k[8][4] = {}, of_q[8][4] = {};
    KRASIS_UNROLL_BY(1)
    for (int column = 0; column < key_dim; column += 16) {
        uint32_t left_k[4], left_q[4];
        left_tile<kWideUnits>(left_k, k, 16 * warp, column, lane);
        left_tile<kWideUnits>(left_q, q, 16 * warp, column, lane);
        KRASIS_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
            if (pair > warp) continue;  // above the diagonal
            uint32_t right[2][2];
            right_tiles_transposed<kWideUnits>(right, k, 16 * pair, column, lane);
            KRASIS_UNROLL
            for (int n = 0; n < 2; ++n) {
                simt::mma(Type{}, of_k[2 * pair + n], left_k, right[n]);
                simt::mma(Type{}, of_q[2 * pair + n], left_q, right[n]);
            }
        }
    }
    simt::sync_threads();  // q becomes L
    KRASIS_UNROLL
    for (int n = 0; n < 8; ++n) {
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = 16 * warp + lane / 4 + 8 * half, j = 8 * n + lane % 4 * 2;
            const float sum = simt::shared_load<float>(sums + i), step = simt::shared_load<float>(sums + kChunk + i);
            float seen[2] = {}, known[2] = {};
            KRASIS_UNROLL
            for (int m = 0; m < 2; ++m) {
                if (j + m > i) continue;
                const float decay = simt::exp_float(sum - simt::shared_load<float>(sums + j + m));
                seen[m] = decay * of_q[n][2 * half + m];
                known[m] = j + m < i ? step * decay * of_k[n][2 * half + m] : 0.0f;
            }
            simt::shared_store(system + i * kChunk + j, simt::Words2{{float_bits(known[0]), float_bits(known[1])}});
            reinterpret_cast<uint32_t *>(own + kSquareBytes)[(i * kChunk + j) / 2] = pack2<Type>(seen[0], seen[1]);
        }
    }
    simt::sync_threads();
    if (thread < kChunk) solve_column<Type>(system, reinterpret_cast<uint16_t *>(own), thread);
}

}  // namespace krasis::cuda
