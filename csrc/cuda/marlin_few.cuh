// marlin_few.cuh: the grouped W4A16 product for the few slots of decode: a block takes 64 columns (gated: 64 of gate
// and 64 of up) of one row block of 16, eight rows at a time, and its warps share k.
//
// There is nothing to reuse with so few rows, and a block's life is short: what counts is that all blocks run at once
// and that each warp has much under way from its first instruction to its last. k goes in chunks of eight k16 steps
// (4 KiB of 64 columns), dealt to eight parts; a warp takes two parts, one after the other. Each step's codes are
// loaded into the registers that the step eight before has just left, across the ends of chunks and parts, so that 4
// KiB a warp are always under way; a group's scales and the rows come the same way. Products are as in moe_worker.cuh,
// weights as rows; a group's sums are scaled and added up in fp32, and so are the parts', in the order of their
// numbers: the bits do not depend on how parts are dealt to warps.
//
// With ids (one row a slot, no sorting) a block reads which expert it has by itself, and the last block of a token's
// columns to end adds the token's slots up.
#pragma once

#include "moe_tiles.cuh"

namespace krasis::cuda {

inline constexpr int kFewRows = 16, kFewParts = 8, kFewTileWarps = 4;

template <class Type_, class Codes_, bool kGated_>
struct FewWorker {
    using Type = Type_;
    using Codes = Codes_;
    static constexpr bool kGated = kGated_, kBlockScales = Codes::kHasBlockScales;
    static constexpr int kTiles = kGated ? 2 : 1, kThreads = 32 * kFewTileWarps * kTiles;
    static constexpr int kChunk = 8;  // k16 steps
    static constexpr int kRows = 8;
    static constexpr int kRowFloats = 68;  // of 64 columns: then neither stores nor loads meet in a bank
    static constexpr int kTileFloats = kRows * kRowFloats, kPartFloats = kTiles * kTileFloats;
    static constexpr int kSharedBytes = kFewParts * kPartFloats * 4;

    const MoeGemmParams &p;
    float *sums;            // shared: [part][tile][row][column]
    int unit;               // twice the number of the tile, and 1 more for the second half of its rows
    const uint8_t *codes;   // this lane's, of the first k16
    const uint8_t *scales;  // likewise
    const uint8_t *x;       // row lane / 4, from column 2 (lane % 4)
    bool has_row;
    simt::Words4 words[kChunk];
    // Of half as many steps, for they are near: rows, and the scales of the group or blocks that end with an odd step.
    uint32_t pairs[kChunk / 2][2];
    simt::Words4 group_scales[kBlockScales ? 1 : 2];
    simt::Words2 exponents[kBlockScales ? 2 : 1];
    float sum[4][4], part[4][4];  // [word][fragment]; part: of the running group

    KRASIS_DEVICE FewWorker(const MoeGemmParams &params, int own_unit)
        : p(params), sums(reinterpret_cast<float *>(simt::shared_memory())), unit(own_unit) {}

    // Asked for anew each time: registers are few.
    KRASIS_DEVICE static int thread() { return static_cast<int>(simt::thread_x()); }
    KRASIS_DEVICE static int tile() { return thread() / 32 / kFewTileWarps; }
    KRASIS_DEVICE static int first_part() { return thread() / 32 % kFewTileWarps; }
    KRASIS_DEVICE int steps() const { return p.k_steps * 4; }
    KRASIS_DEVICE int column_block() const { return unit / 2 % p.column_blocks; }
    KRASIS_DEVICE int row_block() const {
        return unit / 2 / p.column_blocks + (p.ids ? 0 : p.first_block[p.expert_begin]);
    }
    // With ids a row block is a slot.
    KRASIS_DEVICE int expert() const { return p.ids ? p.ids[row_block()] : p.block_experts[row_block()]; }
    // Of one of the eight rows; negative: padding.
    KRASIS_DEVICE int slot_of(int row) const {
        if (p.ids) return row || unit % 2 ? -1 : row_block();
        return p.sorted_slots[static_cast<int64_t>(row_block()) * kFewRows + unit % 2 * kRows + row];
    }

    // For rows of a present expert.
    KRASIS_DEVICE void begin() {
        const int lane = thread() % 32;
        const int column_tile = column_block() + tile() * p.gate_tiles;
        const auto *base = static_cast<const uint8_t *>(p.expert_base[expert()]);
        codes = base + p.codes_offset + static_cast<int64_t>(column_tile) * 512 + lane * 16;
        // Groups: columns 8c + g of a tile, g = lane / 4, are at 8g + c; blocks: byte c is column 8c + g's. One scale a
        // channel: columns 32 half + 8b + g are at 32 half + 8 (g / 2) + 2b + g % 2.
        const int own_scales = kBlockScales ? lane / 4 * 8 : p.group_shift ? lane / 4 * 16 : lane / 8 * 16;
        scales = base + p.scales_offset + static_cast<int64_t>(column_tile) * (kBlockScales ? 64 : 128) + own_scales;
        const int own = slot_of(lane / 4);
        has_row = own >= 0;
        const auto row = static_cast<uint32_t>(has_row ? own / p.slots_per_row : 0);
        x = p.activations + row * uint64_t{16} * p.activation_stride_chunks + lane % 4 * 4;
    }

    KRASIS_DEVICE void clear_sums() {
        KRASIS_UNROLL
        for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = part[i / 4][i % 4] = 0;
    }

    KRASIS_DEVICE float scale_to_float(uint32_t bits) const {
        const auto low = static_cast<uint16_t>(bits);
        return p.scale_is_bf16 ? bf16_to_float(low) : f16_to_float(low);
    }

    KRASIS_DEVICE void fold(int word, float low, float high) {
        KRASIS_UNROLL
        for (int f = 0; f < 4; ++f) {
            sum[word][f] = simt::fused_multiply_add(part[word][f], f < 2 ? low : high, sum[word][f]);
            part[word][f] = 0;
        }
    }

    KRASIS_DEVICE void fold_group(const simt::Words4 &own) {
        KRASIS_UNROLL
        for (int word = 0; word < 4; ++word) fold(word, scale_to_float(own.w[word]), scale_to_float(own.w[word] >> 16));
    }

    KRASIS_DEVICE void fold_channels() {
        const int g = thread() % 32 / 4;
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const auto own = *reinterpret_cast<const simt::Words4 *>(scales + 64 * half);
            KRASIS_UNROLL
            for (int word = 0; word < 2; ++word) {
                const uint32_t low = own.w[2 * word] >> (16 * (g % 2)), high = own.w[2 * word + 1] >> (16 * (g % 2));
                fold(2 * half + word, scale_to_float(low), scale_to_float(high));
            }
        }
    }

    // Whether a group ends with the step k of a chunk.
    KRASIS_DEVICE bool ends_group(int k) const {
        return k % 2 && p.group_shift && ((k + 1) & ((1 << p.group_shift) - 1)) == 0;
    }

    // Starts loads for a k16 step, which is step k of its chunk; nothing past the last step. The offset of the codes
    // goes from step to step, and the compiler is kept from knowing: it would keep the multiples in registers.
    KRASIS_DEVICE void load_codes(int step, int k, uint32_t &offset) {
        words[k] = simt::load_once(codes + offset, step < steps());
        offset += static_cast<uint32_t>(p.column_tiles) * 512;
        simt::hold(offset);
    }
    KRASIS_DEVICE uint32_t codes_offset(int step) const {
        return static_cast<uint32_t>(step) * static_cast<uint32_t>(p.column_tiles) * 512;
    }

    KRASIS_DEVICE void load_row(int step, int k) {
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            pairs[k % 4][half] = simt::load_early1(x + step * 32 + half * 16, step < steps() && has_row);
        }
    }

    // Of the group or blocks that end with an odd step.
    KRASIS_DEVICE void load_scales(int step, int k) {
        if constexpr (kBlockScales) {  // of 32 k
            const int64_t row = static_cast<int64_t>(step / 2) * p.column_tiles * 64;
            exponents[k / 2 % 2] = simt::load_early2(scales + row, step < steps());
        } else {
            const int64_t row = static_cast<int64_t>(step >> p.group_shift) * p.column_tiles * 128;
            group_scales[k / 2 % 2] = simt::load_once(scales + row, step < steps());
        }
    }

    KRASIS_DEVICE void multiply(int k) {
        KRASIS_UNROLL
        for (int word = 0; word < 4; ++word) {
            uint32_t w[2][2];
            if constexpr (kBlockScales) {
                dequantize_e2m1<Type>(words[k].w[word], exponents[k / 2 % 2].w[word / 2] >> (16 * (word % 2)), w);
            } else {
                dequantize_word<Type>(words[k].w[word], w);
            }
            float (&to)[4] = kBlockScales ? sum[word] : part[word];
            simt::mma(Type{}, to, {w[0][0], w[1][0], w[0][1], w[1][1]}, pairs[k % 4]);
        }
    }

    // Step k of the chunk at `first`, and the loads of what comes four steps later, in this chunk or in the one at
    // `next`. A group of eight steps has only one scale a chunk.
    KRASIS_DEVICE void add_step(int first, int next, int k) {
        multiply(k);
        const int later = k < 4 && first + k + 4 < steps() ? first + k + 4 : next + k % 4;
        load_row(later, k);
        if constexpr (kBlockScales) {
            if (k % 2) load_scales(later, k);
        } else if (ends_group(k)) {
            fold_group(group_scales[k / 2 % 2]);
            load_scales(p.group_shift == 3 ? next + k : later, k);
        }
    }

    // The chunk at k16 step `first`, and the loads of the one at `next`. A chunk has four or eight steps.
    KRASIS_DEVICE void add_chunk(int first, int next) {
        uint32_t offset = codes_offset(next);
        KRASIS_UNROLL
        for (int half = 0; half < 2; ++half) {
            const bool exists = first + 4 * half < steps();
            KRASIS_UNROLL
            for (int k = 4 * half; k < 4 * half + 4; ++k) {
                if (exists) add_step(first, next, k);
                load_codes(next + k, k, offset);
            }
        }
    }

    KRASIS_DEVICE void share(int own_part) const {
        const int lane = thread() % 32;
        KRASIS_UNROLL
        for (int word = 0; word < 4; ++word) {
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) {
                const int row = 2 * (lane % 4) + f % 2, column = 16 * word + 8 * (f / 2) + lane / 4;
                simt::shared_store(sums + own_part * kPartFloats + tile() * kTileFloats + row * kRowFloats + column,
                                   sum[word][f]);
            }
        }
    }

    KRASIS_DEVICE float total(int own_tile, int row, int column) const {
        float value = 0;
        KRASIS_UNROLL
        for (int i = 0; i < kFewParts; ++i) {
            value +=
                simt::shared_load<float>(sums + i * kPartFloats + own_tile * kTileFloats + row * kRowFloats + column);
        }
        if constexpr (kBlockScales) value *= block_unit(Type{});
        if (p.bias) {
            const int64_t columns = (kGated ? p.gate_tiles : p.column_tiles) * 64;
            value += (own_tile ? p.up_bias : p.bias)[expert() * columns + column_block() * 64 + column];
        }
        return value;
    }

    KRASIS_DEVICE void store() const {
        for (int cell = thread(); cell < kRows * 64; cell += kThreads) {
            const int row = cell / 64, column = cell % 64;
            const int64_t slot = slot_of(row);
            if (slot < 0) break;  // rows behind a padding row are padding
            float value = total(0, row, column);
            if constexpr (!kGated) {
                if (p.is_relu_squared) value = moe_relu_squared(value);
            } else {
                const float up = total(1, row, column);
                if (p.is_silu) {
                    value *= simt::reciprocal(1.0f + simt::exp_float(-value)) * up;
                } else {
                    value = moe_activate(p.activation, value, up);
                }
            }
            const int64_t index = slot * p.out_stride + column_block() * 64 + column;
            if (p.out_is_float) {
                reinterpret_cast<float *>(p.out)[index] = value;
            } else {
                reinterpret_cast<uint16_t *>(p.out)[index] = Type::from_float(value);
            }
        }
        simt::sync_threads();
    }

    KRASIS_DEVICE void begin_loads(int first) {
        uint32_t offset = codes_offset(first);
        KRASIS_UNROLL
        for (int k = 0; k < kChunk; ++k) load_codes(first + k, k, offset);
        KRASIS_UNROLL
        for (int k = 0; k < kChunk / 2; ++k) {
            load_row(first + k, k);
            if (k % 2 && (kBlockScales || ends_group(k))) load_scales(first + k, k);
        }
        if (!kBlockScales && p.group_shift == 3) load_scales(first + kChunk - 1, kChunk - 1);
    }

    KRASIS_DEVICE void run() {
        begin();
        constexpr int kStride = kFewParts * kChunk;
        begin_loads(first_part() * kChunk);
        KRASIS_UNROLL_BY(1)
        for (int own = first_part(); own < kFewParts; own += kFewTileWarps) {
            clear_sums();
            KRASIS_UNROLL_BY(1)
            for (int first = own * kChunk; first < steps(); first += kStride) {
                const int following = (own + kFewTileWarps) * kChunk;  // the first chunk of the warp's next part
                const int next = first + kStride < steps() ? first + kStride
                                 : own < kFewTileWarps     ? following
                                                           : steps();
                add_chunk(first, next);
            }
            if (!kBlockScales && p.group_shift == 0) fold_channels();
            share(own);
        }
        simt::sync_threads();
        store();
    }
};

// hidden[t, columns] += the weighted sum of the token's slots, in their order: by the last of the blocks of these
// columns to end. shared: int32 [1], free.
template <class Type>
KRASIS_DEVICE void add_slots(const MoeGemmParams &p) {
    const int thread = static_cast<int>(simt::thread_x()), block = static_cast<int>(simt::block_x());
    const int token = block / p.column_blocks / p.top_k, column_block = block % p.column_blocks;
    auto *flag = reinterpret_cast<int32_t *>(simt::shared_memory());
    if (thread == 0) {
        uint32_t *counter = p.arrivals + static_cast<int64_t>(token) * p.column_blocks + column_block;
        simt::shared_store(flag, static_cast<int32_t>(simt::arrive_last(counter, static_cast<uint32_t>(p.top_k))));
    }
    simt::sync_threads();
    if (!simt::shared_load<int32_t>(flag) || thread >= 64) return;
    const int64_t column = column_block * 64 + thread;
    float *hidden = p.hidden + static_cast<int64_t>(token) * p.column_tiles * 64 + column;
    float sum = *hidden;
    constexpr int kAtOnce = 8;
    for (int first = 0; first < p.top_k; first += kAtOnce) {
        // All loads before any use; what lies where no expert wrote is not used.
        float values[kAtOnce], weights[kAtOnce];
        bool counts[kAtOnce];
        KRASIS_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int own = token * p.top_k + (first + i < p.top_k ? first + i : first), id = p.ids[own];
            const auto *value = reinterpret_cast<const uint16_t *>(p.out) + own * p.out_stride + column;
            values[i] = Type::to_float(simt::load_written(value));
            weights[i] = p.slot_weights[own];
            counts[i] = first + i < p.top_k && id >= 0 && id < p.expert_end;
        }
        KRASIS_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const float more = simt::fused_multiply_add(weights[i], values[i], sum);
            sum = counts[i] ? more : sum;
        }
    }
    *hidden = sum;
}

// Eight rows, or none of them if there are none.
template <class Worker>
KRASIS_DEVICE void run_unit(const MoeGemmParams &p, int unit) {
    Worker worker(p, unit);
    const int expert = worker.expert(), slot = worker.slot_of(0);
    const bool known = expert >= p.expert_begin && expert < p.expert_end;
    if (!known || slot < 0 || p.expert_base[expert] == nullptr) return;
    worker.run();
    const int thread = Worker::thread();
    if (p.num_executed && worker.column_block() == 0 && thread < Worker::kRows && worker.slot_of(thread) >= 0)
        simt::global_atomic_add(p.num_executed, 1ull);
}

// p.column_blocks: column tiles of the output. With ids: a block for each of them of each slot.
template <class Type, class Codes, bool kGated>
KRASIS_KERNEL((FewWorker<Type, Codes, kGated>::kThreads), (kGated ? 2 : 4))
moe_few_kernel(const MoeGemmParams p) {
    simt::follow();
    int unit = 2 * static_cast<int>(simt::block_x());
    const int end =
        p.ids ? unit + 1 : 2 * (p.first_block[p.expert_end] - p.first_block[p.expert_begin]) * p.column_blocks;
    KRASIS_UNROLL_BY(1)
    while (unit < end) {
        run_unit<FewWorker<Type, Codes, kGated>>(p, unit);
        unit += unit % 2 ? 2 * static_cast<int>(simt::num_blocks()) - 1 : 1;
    }
    if (p.ids && p.hidden) add_slots<Type>(p);
}

}  // namespace krasis::cuda
