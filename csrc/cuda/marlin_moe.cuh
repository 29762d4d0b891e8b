// marlin_moe.cuh: the grouped W4A16 product, in tiles of rows x 256 columns.
//
// Weights are the rows of the tensor cores' products and activations their columns: out^T = W^T x^T. A Marlin word is
// then one A fragment, 16 columns of the weight by 16 k, and all that a lane holds of it, codes as well as sums,
// belongs to the same two columns of the weight: two scales a fragment.
//
// Shape of a tile. Rows of one expert (kRows = 16, 32, 64 or 128) by four column tiles of 64, in steps of 64 along k
// through a ring of shared-memory stages filled by cp.async. Warps are dealt kWarpsRow x 4; a warp takes half of each
// of two column tiles (2 x 32 columns) and up to 64 rows: a dequantised fragment is used up to eight times. The two
// column tiles of a pair are neighbours, or, when gated, the gate columns and the up columns that go with them:
// silu(gate) * up then needs no exchange between threads.
//
// Scales. Codes are multiplied unscaled, as integers: a scale is never rounded into a 16-bit weight. Sums are kept in
// units of the running group's scale: where a group begins they are multiplied by the last group's scale over the new
// one, in fp32; at the end by the last scale. So there is one set of sums, where scaling each group by itself needs
// two. A group without scale (0) has nothing to be measured in; it counts as 2^-60, which no other scale comes near.
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

inline constexpr float kLeastScale = 0x1p-60f;

template <class Type_, int kRows_>
struct MoeTile {
    using Type = Type_;
    static constexpr int kRows = kRows_;
    static constexpr int kWarpsRow = kRows == 128 ? 2 : 1;
    static constexpr int kRowTiles = kRows / kWarpsRow / 8;  // of a warp
    static constexpr int kThreads = 128 * kWarpsRow;
    static constexpr int kStages = kRows == 64 ? 3 : 4;  // at most 96 KiB, and two blocks of 64 rows in 100 KiB
    static constexpr int kBlocksAtOnce = kRows == 16 ? 4 : kRows == 32 ? 3 : kRows == 64 ? 2 : 1;
    static constexpr int kStepK = 64;
    static constexpr int kColumnTiles = 4;
    static constexpr int kRowBytes = 2 * kStepK;  // one row of activations
    static constexpr int kXBytes = kRows * kRowBytes;
    static constexpr int kTileBytes = 512;                       // 16 x 64 codes
    static constexpr int kK16Bytes = kColumnTiles * kTileBytes;  // 16 x 256 codes
    static constexpr int kCodesBytes = 4 * kK16Bytes;
    static constexpr int kStageBytes = kXBytes + kCodesBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kXRowsPerThread = kRows * 8 / kThreads;
    static constexpr int kCodeChunksPerThread = kCodesBytes / 16 / kThreads;
    static_assert(kXRowsPerThread * kThreads == kRows * 8 && kCodeChunksPerThread * kThreads * 16 == kCodesBytes);
};

struct Place {
    int row_block, column_block;
};

// Everything a thread keeps for one tile.
template <class Tile>
struct MoeWorker {
    using Type = typename Tile::Type;
    static constexpr int kRowTiles = Tile::kRowTiles;

    const MoeGemmParams &p;
    uint8_t *shared;
    uint8_t *read_stage, *write_stage;
    int thread, lane, warp_row, pair, half;
    // of the tile whose copies are being started
    Place place;
    const uint8_t *x_source[Tile::kXRowsPerThread];  // null: a padding row
    const uint8_t *code_source;                      // null: past the last column
    const uint8_t *scale_source[2];                  // of this lane's columns in the pair's tiles; null likewise
    simt::Words2 next_scales[2];                     // of the group after the running one
    int groups_left;                                 // to be loaded
    // [column tile of the pair][word][row tile][fragment]: columns 16 word + 8h + lane / 4 are 2h and 2h + 1
    float sum[2][2][kRowTiles][4];
    float unit[2][2][2];              // [column tile of the pair][word][h]
    uint32_t x[2][kRowTiles / 2][4];  // [buffer][two row tiles]
    simt::Words2 codes[2][2];         // [buffer][column tile of the pair]

    KRASIS_DEVICE explicit MoeWorker(const MoeGemmParams &params) : p(params), shared(simt::shared_memory()) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        const int warp = thread / 32;
        warp_row = warp / 4;
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

    // Makes a tile of a present expert the one whose copies are started, and starts those of its first steps.
    KRASIS_DEVICE void begin(const Place &at) {
        place = at;
        const auto *base = static_cast<const uint8_t *>(p.expert_base[p.block_experts[at.row_block]]);
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kXRowsPerThread; ++i) {
            const int slot = slots_of(at)[thread / 8 + i * (Tile::kThreads / 8)];
            const int64_t offset = slot / p.slots_per_row * p.activation_stride_bytes + thread % 8 * 16;
            x_source[i] = slot < 0 ? nullptr : p.activations + offset;
        }
        const int tile = column_tile(at.column_block, thread / 32 % 4);
        const int64_t offset = thread / 128 * k16_bytes() + static_cast<int64_t>(tile) * Tile::kTileBytes + lane * 16;
        code_source = tile < 0 ? nullptr : base + p.codes_offset + offset;
        begin_scales(base + p.scales_offset);
        read_stage = write_stage = shared;
        KRASIS_UNROLL
        for (int step = 0; step < Tile::kStages; ++step) load_step(step);
    }

    // One scale a channel: columns 32 half + 8b + g of a tile are at 32 half + 8 (g / 2) + 2b + g % 2, g = lane / 4.
    // Groups: columns 8i + g are at 8g + i.
    KRASIS_DEVICE void begin_scales(const uint8_t *scales) {
        const int g = lane / 4, own = p.group_shift ? 8 * g + 4 * half : 32 * half + 8 * (g / 2);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(place.column_block, 2 * pair + i);
            scale_source[i] = tile < 0 ? nullptr : scales + (static_cast<int64_t>(tile) * 64 + own) * 2;
        }
        groups_left = p.group_shift ? p.k_steps * 4 >> p.group_shift : 0;
        load_scales();
    }

    KRASIS_DEVICE int64_t k16_bytes() const { return static_cast<int64_t>(p.column_tiles) * Tile::kTileBytes; }

    // The tile's slots, [kRows].
    KRASIS_DEVICE const int32_t *slots_of(const Place &at) const {
        return p.sorted_slots + static_cast<int64_t>(at.row_block) * Tile::kRows;
    }

    KRASIS_DEVICE void clear_sums() {
        KRASIS_UNROLL
        for (int i = 0; i < 4 * kRowTiles; ++i) {
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) sum[i / kRowTiles / 2][i / kRowTiles % 2][i % kRowTiles][f] = 0;
        }
    }

    KRASIS_DEVICE void advance(uint8_t *&stage) const {
        stage += Tile::kStageBytes;
        if (stage == shared + Tile::kSharedBytes) stage = shared;
    }

    // Starts the copies of the next step of k, or of nothing past the last; one group either way.
    KRASIS_DEVICE void load_step(int step) {
        if (step < p.k_steps) {
            load_x(step);
            load_codes();
            advance(write_stage);
        }
        simt::cp_async_commit();
    }

    KRASIS_DEVICE void load_x(int step) {
        // The rows that a thread copies are a multiple of eight apart: one chunk number for all.
        uint8_t *to = write_stage + thread / 8 * Tile::kRowBytes + (thread % 8 ^ thread / 8 % 8) * 16;
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kXRowsPerThread; ++i) {
            const uint8_t *from = x_source[i];
            simt::cp_async16(to + i * (Tile::kThreads / 8) * Tile::kRowBytes,
                             from ? from + static_cast<int64_t>(step) * Tile::kRowBytes : p.activations,
                             from != nullptr);
        }
    }

    KRASIS_DEVICE void load_codes() {
        uint8_t *to = write_stage + Tile::kXBytes + thread * 16;  // [k16][column tile][lane]
        const bool valid = code_source != nullptr;
        const uint8_t *from = valid ? code_source : p.activations;
        const int64_t stride = valid ? Tile::kThreads / 128 * k16_bytes() : 0;
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kCodeChunksPerThread; ++i, from += stride) {
            simt::cp_async16(to + i * Tile::kThreads * 16, from, valid);
        }
        if (valid) code_source = from;
    }

    // Of the next group, if there is one.
    KRASIS_DEVICE void load_scales() {
        if (groups_left == 0) return;
        --groups_left;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const bool valid = scale_source[i] != nullptr;
            next_scales[i] = valid ? *reinterpret_cast<const simt::Words2 *>(scale_source[i]) : simt::Words2{};
            if (valid) scale_source[i] += static_cast<int64_t>(p.column_tiles) * 128;
        }
    }

    KRASIS_DEVICE void load_fragments(int k16, int buffer) {
        KRASIS_UNROLL
        for (int t = 0; t < kRowTiles / 2; ++t) {
            const int row = (warp_row * kRowTiles + 2 * t + lane / 16) * 8 + lane % 8;
            const int chunk = (2 * k16 + lane / 8 % 2) ^ lane % 8;
            simt::ldmatrix_x4(x[buffer][t], read_stage + row * Tile::kRowBytes + chunk * 16);
        }
        const uint8_t *words =
            read_stage + Tile::kXBytes + k16 * Tile::kK16Bytes + 2 * pair * Tile::kTileBytes + lane * 16 + half * 8;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) codes[buffer][i] = simt::shared_load<simt::Words2>(words + i * Tile::kTileBytes);
    }

    KRASIS_DEVICE float scale_to_float(uint32_t word, int e) const {
        const auto bits = static_cast<uint16_t>(word >> (16 * e));
        return p.scale_is_bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }

    KRASIS_DEVICE float next_unit(int i, int word, int h) const {
        const float scale = scale_to_float(next_scales[i].w[word], h);
        return scale < kLeastScale && scale > -kLeastScale ? kLeastScale : scale;
    }

    // Those of the first group; with one scale a channel the sums stay plain until the end.
    KRASIS_DEVICE void begin_units() {
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) {
            unit[i / 4][i / 2 % 2][i % 2] = p.group_shift ? next_unit(i / 4, i / 2 % 2, i % 2) : 1.0f;
        }
        load_scales();
    }

    KRASIS_DEVICE void take_channel_units() {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (scale_source[i] == nullptr) continue;
            const simt::Words4 words = *reinterpret_cast<const simt::Words4 *>(scale_source[i]);
            KRASIS_UNROLL
            for (int b = 0; b < 4; ++b) {
                // Selected by a shift: which half a lane takes is known at run time only.
                unit[i][b / 2][b % 2] = scale_to_float(words.w[b] >> (16 * (lane / 4 % 2)), 0);
            }
        }
    }

    // Brings the sums of a word's columns to the units of the next group.
    KRASIS_DEVICE void change_units(int i, int word) {
        KRASIS_UNROLL
        for (int h = 0; h < 2; ++h) {
            const float next = next_unit(i, word, h), ratio = simt::quotient(unit[i][word][h], next);
            unit[i][word][h] = next;
            KRASIS_UNROLL
            for (int t = 0; t < kRowTiles; ++t) {
                sum[i][word][t][2 * h] *= ratio;
                sum[i][word][t][2 * h + 1] *= ratio;
            }
        }
    }

    template <bool kNewGroup>
    KRASIS_DEVICE void multiply(int buffer) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < 2; ++word) {
                uint32_t w[2][2];
                dequantize_word<Type>(codes[buffer][i].w[word], w);
                if constexpr (kNewGroup) change_units(i, word);
                const uint32_t a[4] = {w[0][0], w[1][0], w[0][1], w[1][1]};
                KRASIS_UNROLL
                for (int t = 0; t < kRowTiles; ++t) {
                    const uint32_t *pairs = x[buffer][t / 2] + t % 2 * 2;
                    simt::mma(Type{}, sum[i][word][t], a, {pairs[0], pairs[1]});
                }
            }
        }
        if constexpr (kNewGroup) load_scales();
    }

    // After begin.
    KRASIS_DEVICE void run() {
        begin_units();
        // A warp whose rows are all padding only keeps step with the others.
        const bool works = slots_of(place)[warp_row * kRowTiles * 8] >= 0;
        simt::cp_async_wait<Tile::kStages - 1>();
        simt::sync_threads();
        load_fragments(0, 0);
        for (int step = 0; step < p.k_steps; ++step) run_step(step, works);
        if (p.group_shift == 0) take_channel_units();
    }

    KRASIS_DEVICE void run_step(int step, bool works) {
        KRASIS_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            if (k16 == 3) {
                // This stage is in registers; the next must have arrived before its fragments are loaded.
                simt::cp_async_wait<Tile::kStages - 2>();
                simt::sync_threads();
                load_step(step + Tile::kStages);
                advance(read_stage);
                if (step + 1 < p.k_steps) load_fragments(0, 0);
            } else {
                load_fragments(k16 + 1, (k16 + 1) % 2);
            }
            if (!works) continue;
            // Groups begin only at even k16 steps.
            const int before = step * 4 + k16;
            const bool begins = k16 % 2 == 0 && p.group_shift && before && (before & ((1 << p.group_shift) - 1)) == 0;
            if (begins) {
                multiply<true>(k16 % 2);
            } else {
                multiply<false>(k16 % 2);
            }
        }
    }

    KRASIS_DEVICE void store2(int64_t index, uint32_t values) const {
        *reinterpret_cast<uint32_t *>(p.out + index * 2) = values;
    }

    // Output of row tile t, columns 16 word + 8h + lane / 4 of tile i of the pair, rows 2 (lane % 4) and the next.
    KRASIS_DEVICE void values_of(int i, int word, int t, int h, float (&values)[2]) const {
        KRASIS_UNROLL
        for (int e = 0; e < 2; ++e) {
            const float own = sum[i][word][t][2 * h + e] * unit[i][word][h];
            values[e] = own;
            if (p.gate_tiles == 0) continue;
            const float up = sum[1][word][t][2 * h + e] * unit[1][word][h];
            values[e] = own * simt::reciprocal(1.0f + simt::exp_float(-own)) * up;
        }
    }

    // Columns 16 word + 8h of one tile of the pair; column: the first of the pair's half tile.
    KRASIS_DEVICE void store_fragment(const int32_t *slots, int i, int word, int t, int64_t column) const {
        KRASIS_UNROLL
        for (int h = 0; h < 2; ++h) {
            float values[2];
            values_of(i, word, t, h, values);
            const int64_t first = column + 16 * word + 8 * h;
            if (p.out_is_float) {
                KRASIS_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const int64_t slot = slots[8 * t + 2 * (lane % 4) + e];
                    if (slot >= 0) reinterpret_cast<float *>(p.out)[slot * p.out_stride + first + lane / 4] = values[e];
                }
            } else {
                // Two columns of row lane / 4 instead of two rows of column lane / 4.
                const uint32_t pair_of_columns = simt::transpose_8x8(pack2<Type>(values[0], values[1]));
                const int64_t slot = slots[8 * t + lane / 4];
                if (slot >= 0) store2(slot * p.out_stride + first + 2 * (lane % 4), pair_of_columns);
            }
        }
    }

    KRASIS_DEVICE void store(const Place &at) const {
        const int32_t *slots = slots_of(at) + warp_row * kRowTiles * 8;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(at.column_block, 2 * pair + i);
            if (tile < 0 || (p.gate_tiles && i == 1)) continue;
            KRASIS_UNROLL
            for (int word = 0; word < 2; ++word) {
                KRASIS_UNROLL
                for (int t = 0; t < kRowTiles; ++t) store_fragment(slots, i, word, t, tile * 64 + 32 * half);
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

template <class Type, int kRows>
KRASIS_KERNEL((MoeTile<Type, kRows>::kThreads), (MoeTile<Type, kRows>::kBlocksAtOnce))
moe_gemm_kernel(const MoeGemmParams p) {
    MoeTiles tiles(p);
    Place at{}, ahead{};
    bool more = tiles.take(at);
    if (!more) return;
    MoeWorker<MoeTile<Type, kRows>> worker(p);
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
