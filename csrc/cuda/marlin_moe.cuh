// marlin_moe.cuh: the grouped W4A16 product, in tiles of rows x 256 columns.
//
// Shape of a tile. Rows of one expert (kRows = 16, 32 or 64) by four column tiles of 64, in steps of 64 along k
// through a ring of shared-memory stages filled by cp.async. Warps are dealt kWarpsM x 4; a warp takes half of each of
// two column tiles (2 x 32 columns) and kTilesM row tiles of 16. The two column tiles of a pair are neighbours, or,
// when gated, the gate columns and the up columns that go with them: silu(gate) * up then needs no exchange between
// threads.
//
// Scales. A group's codes are summed unscaled in fp32 (integers times activations) and folded into the result with one
// fp32 multiply-add per group, so that a scale is never rounded into a 16-bit weight.
//
// Ring. Stage s + 1 is waited for while stage s has one k16 step left, whose fragments are already in registers: one
// barrier a stage, and the freed stage is refilled at once. Blocks are as many as run at once, each with many tiles:
// the first steps of the next tile are under way while the sums of the last are stored.
#pragma once

#include "marlin_dequant.cuh"

namespace krasis::cuda {

struct MoeGemmParams {
    const uint8_t *activations;  // 16-bit
    int64_t activation_stride_bytes;
    const void *const *expert_base;
    int64_t codes_offset, scales_offset;
    const int32_t *sorted_slots, *block_experts, *first_block;
    uint8_t *out;
    int64_t out_stride;  // elements
    unsigned long long *num_executed;
    int32_t slots_per_row;
    int32_t expert_begin, expert_end;
    int32_t k_steps;        // k / 64
    int32_t column_tiles;   // n / 64
    int32_t group_shift;    // a group is 16 << group_shift along k (1, 2, 3); 0: one scale a channel
    int32_t gate_tiles;     // gated: column tiles of gate; otherwise 0
    int32_t column_blocks;  // blocks along n
    bool scale_is_bf16, out_is_float;
};

template <class Type_, int kWarpsM_, int kTilesM_>
struct MoeTile {
    using Type = Type_;
    static constexpr int kWarpsM = kWarpsM_, kTilesM = kTilesM_;
    static constexpr int kRows = 16 * kWarpsM * kTilesM;
    static constexpr int kThreads = 128 * kWarpsM;
    static constexpr int kStages = 4;
    static constexpr int kStepK = 64;
    static constexpr int kColumnTiles = 4;
    static constexpr int kRowBytes = 2 * kStepK;  // one row of A
    static constexpr int kABytes = kRows * kRowBytes;
    static constexpr int kTileBytes = 512;                       // 16 x 64 codes
    static constexpr int kK16Bytes = kColumnTiles * kTileBytes;  // 16 x 256 codes
    static constexpr int kBBytes = 4 * kK16Bytes;
    static constexpr int kScaleRowBytes = kColumnTiles * 128;  // 256 scales
    static constexpr int kScaleBytes = 2 * kScaleRowBytes;     // group 32 has two rows a step
    static constexpr int kStageBytes = kABytes + kBBytes + kScaleBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kARowsPerThread = kRows * 8 / kThreads;
    static constexpr int kBChunksPerThread = kBBytes / 16 / kThreads;
    static_assert(kARowsPerThread * kThreads == kRows * 8 && kBChunksPerThread * kThreads * 16 == kBBytes);
};

struct Place {
    int row_block, column_block;
};

// Everything a thread keeps for one tile.
template <class Tile>
struct MoeWorker {
    using Type = typename Tile::Type;
    static constexpr int kTilesM = Tile::kTilesM;

    const MoeGemmParams &p;
    uint8_t *shared;
    int thread, lane, warp_m, pair, half;
    // of the current tile
    Place place;
    const uint8_t *codes, *scales;
    const uint8_t *a_source[Tile::kARowsPerThread];  // null: a padding row
    // sums: [row tile][column tile of the pair][8 columns][fragment]
    float sum[kTilesM][2][4][4];   // scaled
    float part[kTilesM][2][4][4];  // of the running group, unscaled
    uint32_t a[2][kTilesM][4];
    simt::Words2 b[2][2];  // [buffer][column tile of the pair]

    KRASIS_DEVICE explicit MoeWorker(const MoeGemmParams &params) : p(params), shared(simt::shared_memory()) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        const int warp = thread / 32;
        warp_m = warp / 4;
        pair = warp % 4 / 2;
        half = warp % 2;
        clear_sums();
    }

    // Column tile of the weight behind tile i of a block of columns; -1: past the last.
    KRASIS_DEVICE int column_tile(int column_block, int i) const {
        if (p.gate_tiles == 0) {
            const int tile = column_block * 4 + i;
            return tile < p.column_tiles ? tile : -1;
        }
        const int gate = column_block * 2 + i / 2;
        return gate < p.gate_tiles ? gate + i % 2 * p.gate_tiles : -1;
    }

    // Makes a tile of a present expert the current one, and starts the copies of its first steps.
    KRASIS_DEVICE void begin(const Place &at) {
        place = at;
        const auto *base = static_cast<const uint8_t *>(p.expert_base[p.block_experts[at.row_block]]);
        codes = base + p.codes_offset;
        scales = base + p.scales_offset;
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kARowsPerThread; ++i) {
            const int slot = slots_of(at)[thread / 8 + i * (Tile::kThreads / 8)];
            a_source[i] = slot < 0
                              ? nullptr
                              : p.activations + slot / p.slots_per_row * p.activation_stride_bytes + thread % 8 * 16;
        }
        KRASIS_UNROLL
        for (int step = 0; step < Tile::kStages; ++step) load_step(step);
    }

    // The tile's slots, [kRows].
    KRASIS_DEVICE const int32_t *slots_of(const Place &at) const {
        return p.sorted_slots + static_cast<int64_t>(at.row_block) * Tile::kRows;
    }

    KRASIS_DEVICE void clear_sums() {
        clear(sum);
        clear(part);
    }

    KRASIS_DEVICE static void clear(float (&values)[kTilesM][2][4][4]) {
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            KRASIS_UNROLL
            for (int i = 0; i < 32; ++i) values[m][i / 16][i / 4 % 4][i % 4] = 0;
        }
    }

    KRASIS_DEVICE uint8_t *stage(int step) const { return shared + step % Tile::kStages * Tile::kStageBytes; }

    // Starts the copies of one step of k, or of nothing past the last; one group either way.
    KRASIS_DEVICE void load_step(int step) {
        if (step < p.k_steps) {
            load_a(step);
            load_b(step);
            if (p.group_shift) load_scales(step);
        }
        simt::cp_async_commit();
    }

    KRASIS_DEVICE void load_a(int step) {
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kARowsPerThread; ++i) {
            const int row = thread / 8 + i * (Tile::kThreads / 8), chunk = thread % 8 ^ row % 8;
            simt::cp_async16(stage(step) + row * Tile::kRowBytes + chunk * 16,
                             a_source[i] ? a_source[i] + static_cast<int64_t>(step) * Tile::kRowBytes : p.activations,
                             a_source[i] != nullptr);
        }
    }

    KRASIS_DEVICE void load_b(int step) {
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kBChunksPerThread; ++i) {
            const int chunk = thread + i * Tile::kThreads;  // [k16][column tile][lane]
            const int tile = column_tile(place.column_block, chunk / 32 % 4);
            const int64_t k16 = static_cast<int64_t>(step) * 4 + chunk / 128;
            const int64_t offset = (k16 * p.column_tiles + tile) * Tile::kTileBytes + chunk % 32 * 16;
            simt::cp_async16(stage(step) + Tile::kABytes + chunk * 16, tile < 0 ? codes : codes + offset, tile >= 0);
        }
    }

    // The scale rows of the groups that this step touches: two for groups of 32, one otherwise.
    KRASIS_DEVICE void load_scales(int step) {
        const int rows = p.group_shift == 1 ? 2 : 1;
        if (thread >= rows * 32) return;
        const int row = (step * 4 >> p.group_shift) + thread / 32;
        const int tile = column_tile(place.column_block, thread % 32 / 8);
        const int64_t offset = (static_cast<int64_t>(row) * p.column_tiles + tile) * 128 + thread % 8 * 16;
        simt::cp_async16(stage(step) + Tile::kABytes + Tile::kBBytes + thread * 16, tile < 0 ? scales : scales + offset,
                         tile >= 0);
    }

    KRASIS_DEVICE void load_fragments(int step, int k16, int buffer) {
        const uint8_t *at = stage(step);
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            const int row = (warp_m * kTilesM + m) * 16 + lane % 16;
            const int chunk = (2 * k16 + lane / 16) ^ row % 8;
            simt::ldmatrix_x4(a[buffer][m], at + row * Tile::kRowBytes + chunk * 16);
        }
        const uint8_t *words =
            at + Tile::kABytes + k16 * Tile::kK16Bytes + 2 * pair * Tile::kTileBytes + lane * 16 + half * 8;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) b[buffer][i] = simt::shared_load<simt::Words2>(words + i * Tile::kTileBytes);
    }

    KRASIS_DEVICE void multiply(int buffer) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int j = 0; j < 2; ++j) {
                uint32_t fragments[2][2];
                dequantize_word<Type>(b[buffer][i].w[j], fragments);
                KRASIS_UNROLL
                for (int m = 0; m < kTilesM; ++m) {
                    simt::mma(Type{}, part[m][i][2 * j], a[buffer][m], fragments[0]);
                    simt::mma(Type{}, part[m][i][2 * j + 1], a[buffer][m], fragments[1]);
                }
            }
        }
    }

    KRASIS_DEVICE float scale_to_float(uint32_t word, int e) const {
        const auto bits = static_cast<uint16_t>(word >> (16 * e));
        return p.scale_is_bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }

    // Group scales of this lane: columns 8j + 2q + e of the half tile are at 8 (2q + e) + 4 half + j.
    KRASIS_DEVICE void load_group_scales(int step, int row, simt::Words2 (&words)[2][2]) const {
        const uint8_t *at = stage(step) + Tile::kABytes + Tile::kBBytes + row * Tile::kScaleRowBytes + 2 * pair * 128;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int e = 0; e < 2; ++e) {
                words[i][e] = simt::shared_load<simt::Words2>(at + i * 128 + (8 * (2 * (lane % 4) + e) + 4 * half) * 2);
            }
        }
    }

    KRASIS_DEVICE void fold_columns(int i, int j, float even, float odd) {
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) {
                sum[m][i][j][f] = simt::fused_multiply_add(part[m][i][j][f], f % 2 ? odd : even, sum[m][i][j][f]);
                part[m][i][j][f] = 0;
            }
        }
    }

    KRASIS_DEVICE void fold_group(const simt::Words2 (&words)[2][2]) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) {
                fold_columns(i, j, scale_to_float(words[i][0].w[j / 2], j % 2),
                             scale_to_float(words[i][1].w[j / 2], j % 2));
            }
        }
    }

    // One scale a channel: columns 8j + 2q + e of a half tile are at 8q + 2j + e.
    KRASIS_DEVICE void fold_channels() {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(place.column_block, 2 * pair + i);
            if (tile < 0) continue;
            const auto *words =
                reinterpret_cast<const simt::Words4 *>(scales + (tile * 64 + 32 * half + 8 * (lane % 4)) * 2);
            const simt::Words4 own = *words;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) fold_columns(i, j, scale_to_float(own.w[j], 0), scale_to_float(own.w[j], 1));
        }
    }

    // After begin.
    KRASIS_DEVICE void run() {
        simt::cp_async_wait<Tile::kStages - 1>();
        simt::sync_threads();
        load_fragments(0, 0, 0);
        for (int step = 0; step < p.k_steps; ++step) run_step(step);
        if (p.group_shift == 0) fold_channels();
    }

    KRASIS_DEVICE void run_step(int step) {
        simt::Words2 words[2][2];
        KRASIS_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            // Groups end only at even counts of k16 steps.
            const bool group_ends =
                k16 % 2 && p.group_shift && ((step * 4 + k16 + 1) & ((1 << p.group_shift) - 1)) == 0;
            if (group_ends) load_group_scales(step, p.group_shift == 1 ? k16 / 2 : 0, words);
            if (k16 == 3) {
                // This stage is in registers; the next must have arrived before its fragments are loaded.
                simt::cp_async_wait<Tile::kStages - 2>();
                simt::sync_threads();
                load_step(step + Tile::kStages);
                if (step + 1 < p.k_steps) load_fragments(step + 1, 0, 0);
            } else {
                load_fragments(step, k16 + 1, (k16 + 1) % 2);
            }
            multiply(k16 % 2);
            if (group_ends) fold_group(words);
        }
    }

    KRASIS_DEVICE void store2(int64_t index, float low, float high) const {
        if (p.out_is_float) {
            auto *out = reinterpret_cast<simt::Words2 *>(p.out + index * 4);
            *out = simt::Words2{{float_bits(low), float_bits(high)}};
        } else {
            *reinterpret_cast<uint32_t *>(p.out + index * 2) = pack2<Type>(low, high);
        }
    }

    KRASIS_DEVICE void store_row(const Place &at, int64_t row, int m, int row_half) const {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(at.column_block, 2 * pair + i);
            if (tile < 0 || (p.gate_tiles && i == 1)) continue;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) {
                float value[2];
                KRASIS_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const float own = sum[m][i][j][2 * row_half + e];
                    value[e] =
                        p.gate_tiles ? own / (1.0f + simt::exp_float(-own)) * sum[m][1][j][2 * row_half + e] : own;
                }
                store2(row * p.out_stride + tile * 64 + 32 * half + 8 * j + 2 * (lane % 4), value[0], value[1]);
            }
        }
    }

    KRASIS_DEVICE void store(const Place &at) const {
        KRASIS_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
            KRASIS_UNROLL
            for (int row_half = 0; row_half < 2; ++row_half) {
                const int slot = slots_of(at)[(warp_m * kTilesM + m) * 16 + 8 * row_half + lane / 4];
                if (slot >= 0) store_row(at, slot, m, row_half);
            }
        }
    }

    KRASIS_DEVICE void count_executed(const Place &at) const {
        if (p.num_executed == nullptr || at.column_block != 0 || thread >= 32) return;
        unsigned long long count = 0;
        for (int row = lane; row < Tile::kRows; row += 32) count += slots_of(at)[row] >= 0;
        if (count) simt::global_atomic_add(p.num_executed, count);
    }
};

// The tiles of one block: every num_blocks-th of those whose expert is present.
struct MoeTiles {
    const MoeGemmParams &p;
    int first;
    int64_t next, end;

    KRASIS_DEVICE explicit MoeTiles(const MoeGemmParams &params)
        : p(params), first(params.first_block[params.expert_begin]), next(simt::block_x()) {
        end = static_cast<int64_t>(p.first_block[p.expert_end] - first) * p.column_blocks;
    }

    // False: no more.
    KRASIS_DEVICE bool take(Place &at) {
        while (next < end) {
            at.row_block = first + static_cast<int>(next / p.column_blocks);
            at.column_block = static_cast<int>(next % p.column_blocks);
            next += simt::num_blocks();
            if (p.expert_base[p.block_experts[at.row_block]] != nullptr) return true;
        }
        return false;
    }
};

template <class Type, int kWarpsM, int kTilesM>
KRASIS_KERNEL(128 * kWarpsM, 1)
moe_gemm_kernel(const MoeGemmParams p) {
    MoeTiles tiles(p);
    Place at{}, ahead{};
    bool more = tiles.take(at);
    if (!more) return;
    MoeWorker<MoeTile<Type, kWarpsM, kTilesM>> worker(p);
    worker.begin(at);
    while (more) {
        worker.run();
        more = tiles.take(ahead);
        if (more) worker.begin(ahead);
        worker.store(at);
        worker.count_executed(at);
        worker.clear_sums();
        at = ahead;
    }
}

}  // namespace krasis::cuda
