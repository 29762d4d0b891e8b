// moe_worker.cuh: what the two kernels of the grouped W4A16 product share: tiles of rows x 256 columns, the copies into
// shared memory, scales, and the way out.
//
// Weights are the rows of the tensor cores' products and activations their columns: out^T = W^T x^T. A Marlin word is
// then one A fragment, 16 columns of the weight by 16 k, and all that a lane holds of it, codes as well as sums,
// belongs to the same two columns of the weight: two scales a fragment.
//
// Shape of a tile. Rows of one expert by four column tiles of 64, in steps of 64 along k through a ring of
// shared-memory stages filled by cp.async. A warp takes the same words of two column tiles. The two are neighbours, or,
// when gated, a gate tile and the up tile that goes with it: silu(gate) * up then needs no exchange between threads.
//
// Scales. Codes are multiplied unscaled, as integers: a scale is never rounded into a 16-bit weight. Sums are kept in
// units of the running group's scale: where a group begins they are multiplied by the last group's scale over the new
// one, in fp32; at the end by the last scale. So there is one set of sums, where scaling each group by itself needs
// two. A group without scale (0) has nothing to be measured in; it counts as 2^-60, which no other scale comes near.
// Scales of blocks (E2m1Codes) are powers of two and part of the 16-bit weights, exactly; they come through the ring
// beside the codes.
//
// Blocks are as many as run at once, each with many tiles: the first steps of the next tile are under way while the
// sums of the last are stored.
#pragma once

#include "marlin_dequant.cuh"
#include "moe_params.cuh"

namespace krasis::cuda {

inline constexpr float kLeastScale = 0x1p-60f;

// kRows rows of 64 k and 4 x 4 tiles of codes a step, and, if kScaleBytes, their 2 x 256 scales. Kernels add how warps
// share them.
template <int kRows_, int kThreads_, int kStages_, int kScaleBytes_>
struct MoeTile {
    static constexpr int kRows = kRows_, kThreads = kThreads_, kStages = kStages_;
    static constexpr int kStepK = 64;
    static constexpr int kColumnTiles = 4;
    static constexpr int kRowBytes = 2 * kStepK;  // one row of activations
    static constexpr int kXBytes = kRows * kRowBytes;
    static constexpr int kTileBytes = 512;                       // 16 x 64 codes
    static constexpr int kK16Bytes = kColumnTiles * kTileBytes;  // 16 x 256 codes
    static constexpr int kCodesBytes = 4 * kK16Bytes;
    static constexpr int kScalesAt = kXBytes + kCodesBytes;  // [group][column tile][64]
    static constexpr int kStageBytes = kScalesAt + kScaleBytes_;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kXRowsPerThread = kRows * 8 / kThreads;
    static constexpr int kCodeChunksPerThread = kCodesBytes / 16 / kThreads;
    static_assert(kXRowsPerThread * kThreads == kRows * 8 && kCodeChunksPerThread * kThreads * 16 == kCodesBytes);
};

// Everything a thread keeps for one tile, but the fragments. Tile adds kWords: words of each of the pair's tiles that a
// warp takes, kRowTiles: of eight rows, likewise, and kAhead: steps whose copies are started before they are used.
template <class Tile>
struct MoeWorker {
    using Type = typename Tile::Type;
    using Codes = typename Tile::Codes;
    static constexpr int kRowTiles = Tile::kRowTiles, kWords = Tile::kWords;

    const MoeGemmParams &p;
    uint8_t *shared;
    int read_stage, write_stage;  // offsets in shared memory
    int thread, lane;
    int warp_row, pair, first_word;  // this warp's part
    // of the tile whose copies are being started
    Place place;
    int x_source[Tile::kXRowsPerThread];  // in 16 bytes from the first activation; -1: a padding row
    const uint8_t *code_source;           // past the last column: another's
    bool has_codes, has_scales;
    const uint8_t *scale_source[2];   // of this lane's columns in the pair's tiles; likewise another's
    uint32_t next_scales[2][kWords];  // of the group after the running one
    int groups_left;                  // to be loaded
    // [column tile of the pair][word][row tile][fragment]: columns 16 word + 8h + lane / 4 are 2h and 2h + 1
    float sum[2][kWords][kRowTiles][4];
    float unit[2][kWords][2];  // [column tile of the pair][word][h]

    KRASIS_DEVICE explicit MoeWorker(const MoeGemmParams &params) : p(params), shared(simt::shared_memory()) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        const int warp = thread / 32;
        warp_row = kWords == 2 ? warp / 4 : 0;
        pair = kWords == 2 ? warp % 4 / 2 : warp / 4;
        first_word = kWords == 2 ? warp % 2 * 2 : warp % 4;
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
            x_source[i] = slot < 0 ? -1 : slot / p.slots_per_row * p.activation_stride_chunks + thread % 8;
        }
        const int tile = column_tile(at.column_block, thread / 32 % 4);
        has_codes = tile >= 0;
        const int64_t column = static_cast<int64_t>(has_codes ? tile : 0) * Tile::kTileBytes + lane * 16;
        code_source = base + p.codes_offset + thread / 128 * k16_bytes() + column;
        if constexpr (Codes::kHasBlockScales) {
            begin_block_scales(base + p.scales_offset);
        } else {
            begin_scales(base + p.scales_offset);
        }
        read_stage = write_stage = 0;
        KRASIS_UNROLL
        for (int step = 0; step < Tile::kAhead; ++step) load_step(step);
    }

    // Groups: columns 8i + g of a tile, g = lane / 4, are at 8g + i. One scale a channel: columns 32 half + 8b + g are
    // at 32 half + 8 (g / 2) + 2b + g % 2.
    KRASIS_DEVICE void begin_scales(const uint8_t *scales) {
        const int g = lane / 4;
        const int own =
            p.group_shift ? 8 * g + 2 * first_word : 32 * (first_word / 2) + 8 * (g / 2) + 4 * (first_word % 2);
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(place.column_block, 2 * pair + i);
            scale_source[i] = scales + (static_cast<int64_t>(tile < 0 ? 0 : tile) * 64 + own) * 2;
        }
        groups_left = p.group_shift ? p.k_steps * 4 >> p.group_shift : 0;
        load_scales();
    }

    // Each of the first 32 threads copies 16 scales a step: of group thread / 16, tile thread / 4 % 4.
    KRASIS_DEVICE void begin_block_scales(const uint8_t *scales) {
        const int tile = column_tile(place.column_block, thread / 4 % 4);
        has_scales = thread < 32 && tile >= 0;
        const int group = thread / 16 % 2, column = (tile < 0 ? 0 : tile) * 64 + thread % 4 * 16;
        scale_source[0] = scales + static_cast<int64_t>(group) * p.column_tiles * 64 + column;
        groups_left = 0;
    }

    KRASIS_DEVICE void load_block_scales() {
        if (thread < 32) {
            simt::cp_async16(shared + write_stage + Tile::kScalesAt + thread * 16, scale_source[0], has_scales);
        }
        scale_source[0] += static_cast<int64_t>(p.column_tiles) * 128;
    }

    // Of a k16 step's group and tile i of the pair: byte 2w + h for word w, columns 8h and on.
    KRASIS_DEVICE uint32_t block_scales(int i, int k16) const {
        const int at = (k16 / 2 * 4 + 2 * pair + i) * 64 + 8 * (lane / 4) + first_word / 2 * 4;
        const auto both = simt::shared_load<uint32_t>(shared + read_stage + Tile::kScalesAt + at);
        return both >> (16 * (first_word % 2));
    }

    KRASIS_DEVICE int64_t k16_bytes() const { return static_cast<int64_t>(p.column_tiles) * Tile::kTileBytes; }

    // The tile's slots, [kRows].
    KRASIS_DEVICE const int32_t *slots_of(const Place &at) const {
        return p.sorted_slots + static_cast<int64_t>(at.row_block) * Tile::kRows;
    }

    KRASIS_DEVICE void clear_sums() {
        KRASIS_UNROLL
        for (int i = 0; i < 2 * kWords * kRowTiles; ++i) {
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) sum[i / kRowTiles / kWords][i / kRowTiles % kWords][i % kRowTiles][f] = 0;
        }
    }

    KRASIS_DEVICE static void advance(int &stage) {
        stage += Tile::kStageBytes;
        if (stage == Tile::kSharedBytes) stage = 0;
    }

    // Starts the copies of the next step of k, or of nothing past the last; one group either way.
    KRASIS_DEVICE void load_step(int step) {
        if (step < p.k_steps) {
            load_x(step);
            load_codes();
            if constexpr (Codes::kHasBlockScales) load_block_scales();
            advance(write_stage);
        }
        simt::cp_async_commit();
    }

    KRASIS_DEVICE void load_x(int step) {
        // The rows that a thread copies are a multiple of eight apart: one chunk number for all.
        uint8_t *to = shared + write_stage + thread / 8 * Tile::kRowBytes + (thread % 8 ^ thread / 8 % 8) * 16;
        const uint8_t *from = p.activations + static_cast<int64_t>(step) * Tile::kRowBytes;
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kXRowsPerThread; ++i) {
            const bool valid = x_source[i] >= 0;
            const auto offset = static_cast<uint32_t>(valid ? x_source[i] : 0) * uint64_t{16};
            simt::cp_async16(to + i * (Tile::kThreads / 8) * Tile::kRowBytes, from + offset, valid);
        }
    }

    KRASIS_DEVICE void load_codes() {
        uint8_t *to = shared + write_stage + Tile::kXBytes + thread * 16;  // [k16][column tile][lane]
        const int64_t stride = Tile::kThreads / 128 * k16_bytes();
        KRASIS_UNROLL
        for (int i = 0; i < Tile::kCodeChunksPerThread; ++i, code_source += stride) {
            simt::cp_async16(to + i * Tile::kThreads * 16, code_source, has_codes);
        }
    }

    // Of the next group, if there is one.
    KRASIS_DEVICE void load_scales() {
        if (groups_left == 0) return;
        --groups_left;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < kWords; ++word) {
                next_scales[i][word] = reinterpret_cast<const uint32_t *>(scale_source[i])[word];
            }
            scale_source[i] += static_cast<int64_t>(p.column_tiles) * 128;
        }
    }

    KRASIS_DEVICE float scale_to_float(uint32_t word, int e) const {
        const auto bits = static_cast<uint16_t>(word >> (16 * e));
        return p.scale_is_bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }

    KRASIS_DEVICE float next_unit(int i, int word, int h) const {
        if (Codes::kHasBlockScales || p.group_shift == 0) return 1.0f;  // the sums stay plain until the end
        const float scale = scale_to_float(next_scales[i][word], h);
        return scale < kLeastScale && scale > -kLeastScale ? kLeastScale : scale;
    }

    // Those of the first group.
    KRASIS_DEVICE void begin_units() {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < kWords; ++word) {
                KRASIS_UNROLL
                for (int h = 0; h < 2; ++h) unit[i][word][h] = next_unit(i, word, h);
            }
        }
    }

    // After the last step.
    KRASIS_DEVICE void end_units() {
        if constexpr (Codes::kHasBlockScales) {
            KRASIS_UNROLL
            for (int i = 0; i < 4 * kWords; ++i) unit[i / 2 / kWords][i / 2 % kWords][i % 2] = block_unit(Type{});
        } else if (p.group_shift == 0) {
            take_channel_units();
        }
    }

    // Biases become part of the sums, whose unit then is 1.
    KRASIS_DEVICE void add_biases(const Place &at) {
        if (p.bias == nullptr) return;
        const int columns = (p.gate_tiles ? p.gate_tiles : p.column_tiles) * 64;
        const int64_t first = static_cast<int64_t>(p.block_experts[at.row_block]) * columns;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const bool is_up = p.gate_tiles && i == 1;
            const int tile = column_tile(at.column_block, 2 * pair + i) - (is_up ? p.gate_tiles : 0);
            const float *own = (is_up ? p.up_bias : p.bias) + first + (tile < 0 ? 0 : tile) * 64;
            KRASIS_UNROLL
            for (int j = 0; j < 2 * kWords; ++j) {
                const int word = j / 2, h = j % 2;
                const float bias = own[16 * (first_word + word) + 8 * h + lane / 4];
                KRASIS_UNROLL
                for (int t = 0; t < 2 * kRowTiles; ++t) {
                    float &cell = sum[i][word][t / 2][2 * h + t % 2];
                    cell = simt::fused_multiply_add(cell, unit[i][word][h], bias);
                }
                unit[i][word][h] = 1;
            }
        }
    }

    KRASIS_DEVICE void take_channel_units() {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < kWords; ++word) {
                const simt::Words2 own = reinterpret_cast<const simt::Words2 *>(scale_source[i])[word];
                KRASIS_UNROLL
                for (int h = 0; h < 2; ++h) {
                    // Selected by a shift: which half a lane takes is known at run time only.
                    unit[i][word][h] = scale_to_float(own.w[h] >> (16 * (lane / 4 % 2)), 0);
                }
            }
        }
    }

    // Brings the sums of a word's columns, of the first kTiles row tiles, to the units of the next group.
    template <int kTiles = kRowTiles>
    KRASIS_DEVICE void change_units(int i, int word) {
        KRASIS_UNROLL
        for (int h = 0; h < 2; ++h) {
            const float next = next_unit(i, word, h), ratio = simt::quotient(unit[i][word][h], next);
            unit[i][word][h] = next;
            KRASIS_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                sum[i][word][t][2 * h] *= ratio;
                sum[i][word][t][2 * h + 1] *= ratio;
            }
        }
    }

    KRASIS_DEVICE void store2(int64_t index, uint32_t values) const {
        *reinterpret_cast<uint32_t *>(p.out + index * 2) = values;
    }

    // Makes outputs of a gate's and an up tile's sums, in the gate's place and in units of 1. Which activation it is is
    // asked once: asked for each number, it takes a fifth of a prompt's product.
    KRASIS_DEVICE void activate() {
        if (p.gate_tiles == 0) return;
        if (p.is_silu) {
            each_gated(
                [](float gate, float up) { return gate * simt::reciprocal(1.0f + simt::exp_float(-gate)) * up; });
        } else {
            each_gated([&](float gate, float up) { return moe_activate(p.activation, gate, up); });
        }
    }

    template <class Activation>
    KRASIS_DEVICE void each_gated(Activation activation) {
        KRASIS_UNROLL
        for (int word = 0; word < kWords; ++word) {
            KRASIS_UNROLL
            for (int t = 0; t < kRowTiles; ++t) {
                KRASIS_UNROLL
                for (int e = 0; e < 4; ++e) {
                    float &gate = sum[0][word][t][e];
                    gate = activation(gate * unit[0][word][e / 2], sum[1][word][t][e] * unit[1][word][e / 2]);
                }
            }
            unit[0][word][0] = unit[0][word][1] = 1;
        }
    }

    // Columns 16 word + 8h of one tile of the pair; column: the first of this warp's words. Of row tile t a thread has
    // columns 8h + lane / 4, rows 2 (lane % 4) and the next.
    KRASIS_DEVICE void store_fragment(const int32_t *slots, int i, int word, int t, int64_t column) const {
        KRASIS_UNROLL
        for (int h = 0; h < 2; ++h) {
            float values[2];
            KRASIS_UNROLL
            for (int e = 0; e < 2; ++e) {
                const float own = sum[i][word][t][2 * h + e] * unit[i][word][h];
                values[e] = p.is_relu_squared ? moe_relu_squared(own) : own;  // without a branch
            }
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

    KRASIS_DEVICE void store(const Place &at) {
        activate();
        const int32_t *slots = slots_of(at) + warp_row * kRowTiles * 8;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int tile = column_tile(at.column_block, 2 * pair + i);
            if (tile < 0 || (p.gate_tiles && i == 1)) continue;
            KRASIS_UNROLL
            for (int word = 0; word < kWords; ++word) {
                KRASIS_UNROLL
                for (int t = 0; t < kRowTiles; ++t) store_fragment(slots, i, word, t, tile * 64 + 16 * first_word);
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

}  // namespace krasis::cuda
