// marlin_few.cuh: the grouped W4A16 product for the few slots of decode: a block takes 64 columns (gated: 64 of gate
// and 64 of up) of one row block of 16, eight rows at a time, and its warps share k.
//
// There is nothing to reuse with so few rows, so codes go from memory to registers, 128 k of 64 columns in one go for
// each warp: many small blocks, much under way. Products are as in moe_worker.cuh, weights as rows; a group's sums are
// scaled and added up in fp32, and so are the warps', in the order of their numbers.
#pragma once

#include "moe_tiles.cuh"

namespace krasis::cuda {

inline constexpr int kFewRows = 16, kFewWarps = 8, kFewThreads = 32 * kFewWarps;

template <class Type_, class Codes_, bool kGated_>
struct FewWorker {
    using Type = Type_;
    using Codes = Codes_;
    static constexpr bool kGated = kGated_;
    static constexpr int kTiles = kGated ? 2 : 1, kChunk = 8;  // k16 steps a warp takes at a time
    static constexpr int kRows = 8;
    static constexpr int kRowFloats = 68;  // of 64 columns: then neither stores nor loads meet in a bank
    static constexpr int kTileFloats = kRows * kRowFloats, kWarpFloats = kTiles * kTileFloats;
    static constexpr int kSharedBytes = kFewWarps * kWarpFloats * 4;

    const MoeGemmParams &p;
    float *sums;  // shared: [warp][tile][row][column]
    int thread, lane, warp;
    const int32_t *slots;     // of the eight rows
    const uint8_t *codes[2];  // this lane's, of the first k16
    const uint8_t *scales[2];
    const uint8_t *x;                             // row lane / 4, from column 2 (lane % 4); null: padding
    int tiles[2];                                 // column tiles of the weight
    float sum[kTiles][4][4], part[kTiles][4][4];  // [word][fragment], of the running group

    KRASIS_DEVICE explicit FewWorker(const MoeGemmParams &params)
        : p(params), sums(reinterpret_cast<float *>(simt::shared_memory())) {
        thread = static_cast<int>(simt::thread_x());
        lane = thread % 32;
        warp = thread / 32;
    }

    KRASIS_DEVICE void begin(const Place &at, int first_row) {
        slots = p.sorted_slots + static_cast<int64_t>(at.row_block) * kFewRows + first_row;
        const auto *base = static_cast<const uint8_t *>(p.expert_base[p.block_experts[at.row_block]]);
        KRASIS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            tiles[i] = at.column_block + i * p.gate_tiles;
            codes[i] = base + p.codes_offset + static_cast<int64_t>(tiles[i]) * 512 + lane * 16;
            scales[i] = base + p.scales_offset + static_cast<int64_t>(tiles[i]) * (Codes::kHasBlockScales ? 64 : 128);
        }
        const int slot = slots[lane / 4];
        const auto row = static_cast<uint32_t>(slot / p.slots_per_row);
        x = slot < 0 ? nullptr : p.activations + row * uint64_t{16} * p.activation_stride_chunks + lane % 4 * 4;
        clear(sum);
        clear(part);
    }

    KRASIS_DEVICE static void clear(float (&values)[kTiles][4][4]) {
        KRASIS_UNROLL
        for (int i = 0; i < 16 * kTiles; ++i) values[i / 16][i / 4 % 4][i % 4] = 0;
    }

    KRASIS_DEVICE float scale_to_float(uint32_t bits) const {
        const auto low = static_cast<uint16_t>(bits);
        return p.scale_is_bf16 ? bf16_to_float(low) : f16_to_float(low);
    }

    KRASIS_DEVICE void fold(int i, int word, float low, float high) {
        KRASIS_UNROLL
        for (int f = 0; f < 4; ++f) {
            sum[i][word][f] = simt::fused_multiply_add(part[i][word][f], f < 2 ? low : high, sum[i][word][f]);
            part[i][word][f] = 0;
        }
    }

    // Columns 8c + g of a tile, g = lane / 4, are at 8g + c.
    KRASIS_DEVICE void fold_group(int group) {
        KRASIS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            const int64_t row = static_cast<int64_t>(group) * p.column_tiles * 128;
            const auto own = *reinterpret_cast<const simt::Words4 *>(scales[i] + row + lane / 4 * 16);
            KRASIS_UNROLL
            for (int word = 0; word < 4; ++word) {
                fold(i, word, scale_to_float(own.w[word]), scale_to_float(own.w[word] >> 16));
            }
        }
    }

    // One scale a channel: columns 32 half + 8b + g are at 32 half + 8 (g / 2) + 2b + g % 2.
    KRASIS_DEVICE void fold_channels() {
        const int g = lane / 4;
        KRASIS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                const auto own = *reinterpret_cast<const simt::Words4 *>(scales[i] + 64 * half + g / 2 * 16);
                KRASIS_UNROLL
                for (int word = 0; word < 2; ++word) {
                    const uint32_t low = own.w[2 * word] >> (16 * (g % 2)),
                                   high = own.w[2 * word + 1] >> (16 * (g % 2));
                    fold(i, 2 * half + word, scale_to_float(low), scale_to_float(high));
                }
            }
        }
    }

    // Of the 32 k from an even k16 step on: byte c for column 8c + lane / 4.
    KRASIS_DEVICE simt::Words2 block_scales(int i, int k16) const {
        const int64_t row = static_cast<int64_t>(k16 / 2) * p.column_tiles * 64;
        return *reinterpret_cast<const simt::Words2 *>(scales[i] + row + lane / 4 * 8);
    }

    // k16 steps first..first + count, count 4 or 8.
    KRASIS_DEVICE void add_chunk(int first, int count) {
        simt::Words4 words[kTiles][kChunk];
        simt::Words2 exponents[kTiles][kChunk / 2];
        uint32_t pairs[kChunk][2];
        KRASIS_UNROLL
        for (int k = 0; k < kChunk; ++k) {
            if (k >= count) continue;
            KRASIS_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                const int64_t offset = static_cast<int64_t>(first + k) * p.column_tiles * 512;
                words[i][k] = *reinterpret_cast<const simt::Words4 *>(codes[i] + offset);
                if constexpr (Codes::kHasBlockScales) {
                    if (k % 2 == 0) exponents[i][k / 2] = block_scales(i, first + k);
                }
            }
            KRASIS_UNROLL
            for (int half = 0; half < 2; ++half) {
                pairs[k][half] = x ? *reinterpret_cast<const uint32_t *>(x + (first + k) * 32 + half * 16) : 0;
            }
        }
        KRASIS_UNROLL
        for (int k = 0; k < kChunk; ++k) {
            if (k >= count) continue;
            KRASIS_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                KRASIS_UNROLL
                for (int word = 0; word < 4; ++word) {
                    uint32_t w[2][2];
                    if constexpr (Codes::kHasBlockScales) {
                        const uint32_t own = exponents[i][k / 2].w[word / 2] >> (16 * (word % 2));
                        dequantize_e2m1<Type>(words[i][k].w[word], own, w);
                    } else {
                        dequantize_word<Type>(words[i][k].w[word], w);
                    }
                    float (&to)[4] = Codes::kHasBlockScales ? sum[i][word] : part[i][word];
                    simt::mma(Type{}, to, {w[0][0], w[1][0], w[0][1], w[1][1]}, pairs[k]);
                }
            }
            if constexpr (Codes::kHasBlockScales) continue;
            // Groups end at even counts of k16 steps.
            if (k % 2 && p.group_shift && ((first + k + 1) & ((1 << p.group_shift) - 1)) == 0) {
                fold_group((first + k) >> p.group_shift);
            }
        }
    }

    KRASIS_DEVICE void share() const {
        KRASIS_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < 4; ++word) {
                KRASIS_UNROLL
                for (int f = 0; f < 4; ++f) {
                    const int row = 2 * (lane % 4) + f % 2, column = 16 * word + 8 * (f / 2) + lane / 4;
                    simt::shared_store(sums + warp * kWarpFloats + i * kTileFloats + row * kRowFloats + column,
                                       sum[i][word][f]);
                }
            }
        }
        simt::sync_threads();
    }

    KRASIS_DEVICE float total(const Place &at, int tile, int row, int column) const {
        float value = 0;
        KRASIS_UNROLL
        for (int w = 0; w < kFewWarps; ++w) {
            value += simt::shared_load<float>(sums + w * kWarpFloats + tile * kTileFloats + row * kRowFloats + column);
        }
        if constexpr (Codes::kHasBlockScales) value *= block_unit(Type{});
        if (p.bias) {
            const int64_t columns = (kGated ? p.gate_tiles : p.column_tiles) * 64;
            const float *own = (tile ? p.up_bias : p.bias) + p.block_experts[at.row_block] * columns;
            value += own[at.column_block * 64 + column];
        }
        return value;
    }

    KRASIS_DEVICE void store(const Place &at) const {
        for (int cell = thread; cell < kRows * 64; cell += kFewThreads) {
            const int row = cell / 64, column = cell % 64;
            const int64_t slot = slots[row];
            if (slot < 0) break;  // rows behind a padding row are padding
            float value = total(at, 0, row, column);
            if constexpr (kGated) {
                const float up = total(at, 1, row, column);
                if (p.is_silu) {
                    value *= simt::reciprocal(1.0f + simt::exp_float(-value)) * up;
                } else {
                    value = moe_activate(p.activation, value, up);
                }
            }
            const int64_t index = slot * p.out_stride + tiles[0] * 64 + column;
            if (p.out_is_float) {
                reinterpret_cast<float *>(p.out)[index] = value;
            } else {
                reinterpret_cast<uint16_t *>(p.out)[index] = Type::from_float(value);
            }
        }
        simt::sync_threads();
    }

    // Eight rows; none of them, if there are none.
    KRASIS_DEVICE void run(const Place &at, int first_row) {
        begin(at, first_row);
        if (slots[0] < 0) return;
        const int steps = p.k_steps * 4;
        for (int first = warp * kChunk; first < steps; first += kFewWarps * kChunk) {
            add_chunk(first, steps - first < kChunk ? steps - first : kChunk);
        }
        if (!Codes::kHasBlockScales && p.group_shift == 0) fold_channels();
        share();
        store(at);
    }

    KRASIS_DEVICE void count_executed(const Place &at) const {
        if (p.num_executed == nullptr || at.column_block != 0 || warp != 0) return;
        const int32_t *all = p.sorted_slots + static_cast<int64_t>(at.row_block) * kFewRows;
        if (lane < kFewRows && all[lane] >= 0) simt::global_atomic_add(p.num_executed, 1ull);
    }
};

// p.column_blocks: column tiles of the output.
template <class Type, class Codes, bool kGated>
KRASIS_KERNEL(kFewThreads, kGated ? 1 : 2)
moe_few_kernel(const MoeGemmParams p) {
    MoeTiles tiles(p);
    FewWorker<Type, Codes, kGated> worker(p);
    Place at{};
    while (tiles.take(at)) {
        for (int row = 0; row < kFewRows; row += FewWorker<Type, Codes, kGated>::kRows) worker.run(at, row);
        worker.count_executed(at);
    }
}

}  // namespace krasis::cuda
