// int8_rows.cuh: the dense W8A16 products on int8 rows [n/32, k/4, 32, 4].
//
// Matrix product. The 16 bytes of a strip that lane 4j + q needs at k16 step s are rows 4j..4j+3 at k4 step 4s + q:
// four consecutive k of four rows. Row 4j + i is made column j of the i-th 8-column fragment, and the four k are made k
// 2q, 2q+1, 2q+8, 2q+9 of the mma; A is read in the same order of k, eight bytes a lane. A lane's sums then belong to
// eight consecutive output columns.
//
// Matrix-vector product. Lane 8r + j of a warp takes the 16 bytes of rows 4j..4j+3 at k4 step 4s + r; eight warps share
// a strip's k steps and add up in a fixed order.
#pragma once

#include "int8_dequant.cuh"
#include "row_norm.cuh"

namespace krasis::cuda {

struct Int8Params {
    const uint8_t *x;
    const uint8_t *weight;
    const float *scales;
    const uint8_t *residual;
    uint8_t *out;
    int64_t x_stride_bytes, out_stride;  // out_stride: elements
    int64_t tokens;
    int32_t k, strips;
    int32_t column_blocks;
    int32_t prefetch_bytes;  // of each strip
    bool out_is_float;
};

template <class Type>
KRASIS_DEVICE float load_out(const Int8Params &p, const uint8_t *from, int64_t index) {
    if (p.out_is_float) return reinterpret_cast<const float *>(from)[index];
    return Type::to_float(reinterpret_cast<const uint16_t *>(from)[index]);
}

template <class Type_, int kWarpsM_, int kTilesM_, int kStrips_, int kStages_>
struct Int8Tile {
    using Type = Type_;
    static constexpr int kWarpsM = kWarpsM_, kTilesM = kTilesM_, kStrips = kStrips_, kStages = kStages_;
    static constexpr int kRows = 16 * kWarpsM * kTilesM;
    static constexpr int kThreads = 128 * kWarpsM;
    static constexpr int kBlockStrips = 4 * kStrips;  // four warps along the columns
    static constexpr int kRowBytes = 128;             // a step is 64 k
    static constexpr int kABytes = kRows * kRowBytes;
    static constexpr int kStripBytes = 2048;
    static constexpr int kStageBytes = kABytes + kBlockStrips * kStripBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kAChunks = kABytes / 16 / kThreads;
    static constexpr int kBChunks = kBlockStrips * kStripBytes / 16 / kThreads;
    static_assert(kAChunks * kThreads * 16 == kABytes && kBChunks * kThreads * 16 == kBlockStrips * kStripBytes);
};

template <class Tile>
struct Int8Worker {
    using Type = typename Tile::Type;
    static constexpr int kTilesM = Tile::kTilesM, kStrips = Tile::kStrips;

    const Int8Params &p;
    uint8_t *shared;
    int thread, lane, warp_m, warp_n, num_steps;
    int64_t first_row;
    int first_strip;
    float sum[kTilesM][kStrips][4][4];
    simt::Words2 a[2][kTilesM][2];  // [buffer][row tile][row half]
    simt::Words4 b[2][kStrips];

    KRASIS_DEVICE Int8Worker(const Int8Params &params, int64_t row_block, int column_block)
        : p(params), shared(simt::shared_memory()) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        warp_m = thread / 32 / 4;
        warp_n = thread / 32 % 4;
        num_steps = p.k / 64;
        first_row = row_block * Tile::kRows;
        first_strip = column_block * Tile::kBlockStrips;
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            KRASIS_UNROLL
            for (int s = 0; s < kStrips; ++s) {
                KRASIS_UNROLL
                for (int i = 0; i < 16; ++i) sum[m][s][i / 4][i % 4] = 0;
            }
        }
    }

    KRASIS_DEVICE uint8_t *stage(int step) const { return shared + step % Tile::kStages * Tile::kStageBytes; }

    // Rows four apart in a quarter of a warp's eight-byte loads must fall into different banks.
    KRASIS_DEVICE static int swizzle(int row, int chunk) { return chunk ^ (row % 4 * 2); }

    KRASIS_DEVICE void load_step(int step) {
        if (step < num_steps) {
            KRASIS_UNROLL
            for (int i = 0; i < Tile::kAChunks; ++i) {
                const int row = thread / 8 + i * (Tile::kThreads / 8), chunk = thread % 8;
                const bool valid = first_row + row < p.tokens;
                const uint8_t *from = p.x + (first_row + row) * p.x_stride_bytes + step * 128 + chunk * 16;
                simt::cp_async16(stage(step) + row * Tile::kRowBytes + swizzle(row, chunk) * 16, valid ? from : p.x,
                                 valid);
            }
            KRASIS_UNROLL
            for (int i = 0; i < Tile::kBChunks; ++i) {
                const int chunk = thread + i * Tile::kThreads;  // [strip][k4][16 bytes of four rows]
                const int strip = first_strip + chunk / 128;
                const bool valid = strip < p.strips;
                const uint8_t *from =
                    p.weight + static_cast<int64_t>(strip) * p.k * 32 + step * 2048 + chunk % 128 * 16;
                simt::cp_async16(stage(step) + Tile::kABytes + chunk * 16, valid ? from : p.weight, valid);
            }
        }
        simt::cp_async_commit();
    }

    KRASIS_DEVICE void load_fragments(int step, int k16, int buffer) {
        const uint8_t *at = stage(step);
        const int g = lane / 4, q = lane % 4;
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = (warp_m * kTilesM + m) * 16 + 8 * half + g;
                a[buffer][m][half] = simt::shared_load<simt::Words2>(at + row * Tile::kRowBytes +
                                                                     swizzle(row, 2 * k16 + q / 2) * 16 + q % 2 * 8);
            }
        }
        KRASIS_UNROLL
        for (int s = 0; s < kStrips; ++s) {
            const uint8_t *strip = at + Tile::kABytes + (warp_n * kStrips + s) * Tile::kStripBytes;
            b[buffer][s] = simt::shared_load<simt::Words4>(strip + (4 * k16 + q) * 128 + g * 16);
        }
    }

    KRASIS_DEVICE void multiply(int buffer) {
        KRASIS_UNROLL
        for (int s = 0; s < kStrips; ++s) {
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) {
                uint32_t fragment[2];
                int8_to_floats(Type{}, b[buffer][s].w[i], fragment);
                KRASIS_UNROLL
                for (int m = 0; m < kTilesM; ++m) {
                    const simt::Words2 *rows = a[buffer][m];
                    const uint32_t both[4] = {rows[0].w[0], rows[1].w[0], rows[0].w[1], rows[1].w[1]};
                    simt::mma(Type{}, sum[m][s][i], both, fragment);
                }
            }
        }
    }

    // The ring is the one of marlin_moe.cuh.
    KRASIS_DEVICE void run() {
        KRASIS_UNROLL
        for (int step = 0; step < Tile::kStages; ++step) load_step(step);
        simt::cp_async_wait<Tile::kStages - 1>();
        simt::sync_threads();
        load_fragments(0, 0, 0);
        for (int step = 0; step < num_steps; ++step) {
            KRASIS_UNROLL
            for (int k16 = 0; k16 < 4; ++k16) {
                if (k16 == 3) {
                    simt::cp_async_wait<Tile::kStages - 2>();
                    simt::sync_threads();
                    load_step(step + Tile::kStages);
                    if (step + 1 < num_steps) load_fragments(step + 1, 0, 0);
                } else {
                    load_fragments(step, k16 + 1, (k16 + 1) % 2);
                }
                multiply(k16 % 2);
            }
        }
    }

    // Columns 8q + i and 8q + 4 + i of a strip are d[0] and d[1] (row g), d[2] and d[3] (row g + 8) of fragment i.
    KRASIS_DEVICE void store() const {
        KRASIS_UNROLL
        for (int s = 0; s < kStrips; ++s) {
            const int strip = first_strip + warp_n * kStrips + s;
            if (strip >= p.strips) continue;
            const int column = strip * 32 + 8 * (lane % 4);
            KRASIS_UNROLL
            for (int m = 0; m < kTilesM; ++m) {
                KRASIS_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int64_t row = first_row + (warp_m * kTilesM + m) * 16 + 8 * half + lane / 4;
                    if (row < p.tokens) store_row(row * p.out_stride + column, column, sum[m][s], half);
                }
            }
        }
    }

    KRASIS_DEVICE void store_row(int64_t index, int column, const float (&fragments)[4][4], int half) const {
        float values[8];
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) {
            values[i] = fragments[i % 4][2 * half + i / 4] * p.scales[column + i];
            if (p.residual) values[i] += load_out<Type>(p, p.residual, index + i);
        }
        if (p.out_is_float) {
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) {
                simt::Words4 words;
                KRASIS_UNROLL
                for (int j = 0; j < 4; ++j) words.w[j] = float_bits(values[4 * i + j]);
                reinterpret_cast<simt::Words4 *>(p.out + 4 * index)[i] = words;
            }
        } else {
            simt::Words4 words;
            KRASIS_UNROLL
            for (int i = 0; i < 4; ++i) words.w[i] = pack2<Type>(values[2 * i], values[2 * i + 1]);
            *reinterpret_cast<simt::Words4 *>(p.out + 2 * index) = words;
        }
    }
};

template <class Type, int kWarpsM, int kTilesM, int kStrips, int kStages>
KRASIS_KERNEL(128 * kWarpsM, 1)
int8_gemm_kernel(const Int8Params p) {
    simt::follow();
    const unsigned columns = static_cast<unsigned>(p.column_blocks);
    Int8Worker<Int8Tile<Type, kWarpsM, kTilesM, kStrips, kStages>> worker(p, simt::block_x() / columns,
                                                                          static_cast<int>(simt::block_x() % columns));
    worker.run();
    worker.store();
}

// Four k of a token: from memory, or of the only token from shared memory.
struct GlobalRows {
    const Int8Params &p;
    KRASIS_DEVICE simt::Words2 load(int t, int byte) const {
        return *reinterpret_cast<const simt::Words2 *>(p.x + t * p.x_stride_bytes + byte);
    }
};
struct SharedRow {
    const uint8_t *row;
    KRASIS_DEVICE simt::Words2 load(int, int byte) const { return simt::shared_load<simt::Words2>(row + byte); }
};

// One strip in one block, up to kTokens tokens. sums: shared, float [kWarps][kTokens][32].
template <class Type, int kTokens, int kWarps, class Rows>
KRASIS_DEVICE void int8_gemv(const Int8Params &p, int strip, const Rows &rows, float *sums) {
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32, warp = thread / 32;
    const int j = lane % 8;
    const uint8_t *codes = p.weight + static_cast<int64_t>(strip) * p.k * 32 + lane * 16;
    float sum[kTokens][4] = {};
    // A warp reads 512 bytes, 16 k, at a time.
    KRASIS_UNROLL_BY(4)
    for (int k16 = warp; k16 < p.k / 16; k16 += kWarps) {
        const simt::Words4 words = *reinterpret_cast<const simt::Words4 *>(codes + static_cast<int64_t>(k16) * 512);
        float weights[4][4];
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) int8_to_floats(words.w[i], weights[i]);
        KRASIS_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (t >= p.tokens) continue;
            const simt::Words2 x = rows.load(t, k16 * 32 + lane / 8 * 8);
            KRASIS_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float value = Type::to_float(static_cast<uint16_t>(x.w[c / 2] >> (16 * (c % 2))));
                KRASIS_UNROLL
                for (int i = 0; i < 4; ++i) sum[t][i] = simt::fused_multiply_add(weights[i][c], value, sum[t][i]);
            }
        }
    }
    KRASIS_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            float value = sum[t][i];
            value += simt::shuffle_xor(value, 8);
            value += simt::shuffle_xor(value, 16);
            if (lane < 8) simt::shared_store(sums + (warp * kTokens + t) * 32 + 4 * j + i, value);
        }
    }
    simt::sync_threads();
    for (int cell = thread; cell < kTokens * 32; cell += 32 * kWarps) {
        const int t = cell / 32, column = strip * 32 + cell % 32;
        if (t >= p.tokens) break;
        float value = 0;
        KRASIS_UNROLL
        for (int w = 0; w < kWarps; ++w) value += simt::shared_load<float>(sums + w * kTokens * 32 + cell);
        const int64_t index = t * p.out_stride + column;
        value *= p.scales[column];
        if (p.residual) value += load_out<Type>(p, p.residual, index);
        if (p.out_is_float) {
            reinterpret_cast<float *>(p.out)[index] = value;
        } else {
            reinterpret_cast<uint16_t *>(p.out)[index] = Type::from_float(value);
        }
    }
}

template <class Type, int kTokens, int kWarps>
KRASIS_DEVICE void int8_gemv(const Int8Params &p, int strip) {
    auto *sums = reinterpret_cast<float *>(simt::shared_memory());
    int8_gemv<Type, kTokens, kWarps>(p, strip, GlobalRows{p}, sums);
}

// Of a strip, towards the cache while the launch ahead still runs.
template <int kWarps>
KRASIS_DEVICE void prefetch_strip(const Int8Params &p, int strip) {
    const uint8_t *weight = p.weight + static_cast<int64_t>(strip) * p.k * 32;
    simt::prefetch_before_wait(weight, p.prefetch_bytes, static_cast<int>(simt::thread_x()), 32 * kWarps);
}

template <class Type, int kTokens, int kWarps>
KRASIS_KERNEL(32 * kWarps, 1)
int8_gemv_kernel(const Int8Params p) {
    const int strip = static_cast<int>(simt::block_x());
    simt::let_next_begin();
    prefetch_strip<kWarps>(p, strip);
    simt::wait_for_previous();
    int8_gemv<Type, kTokens, kWarps>(p, strip);
}

struct NormInt8Params : Int8Params {
    const float *hidden;
    const void *norm;
    int32_t norm_dtype;
    float eps;
};

// The product of a row's norm: every block norms the row by itself. shared: 16 bits [k], the normed row; float
// [kWarps][32]; [kNormWarps].
template <class Type, int kWarps>
KRASIS_KERNEL(32 * kWarps, 1)
norm_int8_gemv_kernel(const NormInt8Params p) {
    static_assert(32 * kWarps >= kNormThreads);
    const int strip = static_cast<int>(simt::block_x()), thread = static_cast<int>(simt::thread_x());
    uint8_t *row = simt::shared_memory();
    auto *sums = reinterpret_cast<float *>(row + 2 * p.k);
    simt::let_next_begin();
    prefetch_strip<kWarps>(p, strip);
    simt::wait_for_previous();
    const float scale = row_scale(p.hidden, 0, p.k, KRASIS_F32, p.eps, sums + 32 * kWarps);
    for (int64_t i = thread * kVector; i < p.k; i += 32 * kWarps * kVector) {
        float values[kVector];
        load_normed8(p.hidden, 0, i, KRASIS_F32, p.norm, p.norm_dtype, scale, values);
        simt::Words4 words;
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) words.w[j] = pack2<Type>(values[2 * j], values[2 * j + 1]);
        simt::shared_store(row + 2 * i, words);
    }
    simt::sync_threads();
    int8_gemv<Type, 1, kWarps>(p, strip, SharedRow{row}, sums);
}

}  // namespace krasis::cuda
