// marlin_moe.cuh: the grouped W4A16 product by mma.sync, which every target has; moe_worker.cuh says how it works.
//
// Warps are dealt 1 or 2 x 4; a warp takes half of each of two column tiles (2 x 32 columns) and up to 64 rows: a
// dequantised fragment is used up to eight times.
//
// Ring. Stage s + 1 is waited for while stage s has one k16 step left, whose fragments are already in registers: one
// barrier a stage, and the freed stage is refilled at once.
#pragma once

#include "moe_tiles.cuh"

namespace krasis::cuda {

// At most 96 KiB of shared memory, and two blocks of 64 rows in 100 KiB; with scales of blocks 2 KiB more.
template <class Type_, class Codes_, int kRows_>
struct MmaTile : MoeTile<kRows_, kRows_ == 128 ? 256 : 128, kRows_ == 64 ? 3 : 4, Codes_::kHasBlockScales ? 512 : 0> {
    using Type = Type_;
    using Codes = Codes_;
    static constexpr int kWords = 2;
    static constexpr int kRowTiles = (kRows_ == 128 ? 64 : kRows_) / 8;
    static constexpr int kAhead = MmaTile::kStages;
    static constexpr int kBlocksAtOnce = kRows_ == 16 ? 4 : kRows_ == 32 ? 3 : kRows_ == 64 ? 2 : 1;
};

template <class Tile>
struct MmaWorker : MoeWorker<Tile> {
    using Type = typename Tile::Type;
    using Codes = typename Tile::Codes;
    using Base = MoeWorker<Tile>;
    using Base::first_word, Base::lane, Base::p, Base::pair, Base::read_stage, Base::shared, Base::sum, Base::warp_row;
    static constexpr int kRowTiles = Tile::kRowTiles;

    uint32_t x[2][kRowTiles / 2][4];  // [buffer][two row tiles]
    simt::Words2 codes[2][2];         // [buffer][column tile of the pair]
    uint32_t scales[2][2];            // likewise, of blocks

    KRASIS_DEVICE explicit MmaWorker(const MoeGemmParams &params) : Base(params) {}

    KRASIS_DEVICE void load_fragments(int k16, int buffer) {
        KRASIS_UNROLL
        for (int t = 0; t < kRowTiles / 2; ++t) {
            const int row = (warp_row * kRowTiles + 2 * t + lane / 16) * 8 + lane % 8;
            const int chunk = (2 * k16 + lane / 8 % 2) ^ lane % 8;
            simt::ldmatrix_x4(x[buffer][t], shared + read_stage + row * Tile::kRowBytes + chunk * 16);
        }
        const uint8_t *words = shared + read_stage + Tile::kXBytes + k16 * Tile::kK16Bytes +
                               2 * pair * Tile::kTileBytes + lane * 16 + first_word * 4;
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) codes[buffer][i] = simt::shared_load<simt::Words2>(words + i * Tile::kTileBytes);
        if constexpr (Codes::kHasBlockScales) {
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) scales[buffer][i] = this->block_scales(i, k16);
        }
    }

    template <bool kNewGroup>
    KRASIS_DEVICE void multiply(int buffer) {
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            KRASIS_UNROLL
            for (int word = 0; word < 2; ++word) {
                uint32_t w[2][2];
                if constexpr (Codes::kHasBlockScales) {
                    dequantize_e2m1<Type>(codes[buffer][i].w[word], scales[buffer][i] >> (16 * word), w);
                } else {
                    dequantize_word<Type>(codes[buffer][i].w[word], w);
                }
                if constexpr (kNewGroup) this->change_units(i, word);
                const uint32_t a[4] = {w[0][0], w[1][0], w[0][1], w[1][1]};
                KRASIS_UNROLL
                for (int t = 0; t < kRowTiles; ++t) {
                    const uint32_t *pairs = x[buffer][t / 2] + t % 2 * 2;
                    simt::mma(Type{}, sum[i][word][t], a, {pairs[0], pairs[1]});
                }
            }
        }
        if constexpr (kNewGroup) this->load_scales();
    }

    // After begin.
    KRASIS_DEVICE void run() {
        this->begin_units();
        this->load_scales();
        // A warp whose rows are all padding only keeps step with the others.
        const bool works = this->slots_of(this->place)[warp_row * kRowTiles * 8] >= 0;
        simt::cp_async_wait<Tile::kStages - 1>();
        simt::sync_threads();
        load_fragments(0, 0);
        for (int step = 0; step < p.k_steps; ++step) run_step(step, works);
        this->end_units();
    }

    KRASIS_DEVICE void run_step(int step, bool works) {
        KRASIS_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            if (k16 == 3) {
                // This stage is in registers; the next must have arrived before its fragments are loaded.
                simt::cp_async_wait<Tile::kStages - 2>();
                simt::sync_threads();
                this->load_step(step + Tile::kStages);
                this->advance(read_stage);
                if (step + 1 < p.k_steps) load_fragments(0, 0);
            } else {
                load_fragments(k16 + 1, (k16 + 1) % 2);
            }
            if (!works) continue;
            // Groups begin only at even k16 steps.
            const int before = step * 4 + k16;
            const bool begins = !Codes::kHasBlockScales && k16 % 2 == 0 && p.group_shift && before &&
                                (before & ((1 << p.group_shift) - 1)) == 0;
            if (begins) {
                multiply<true>(k16 % 2);
            } else {
                multiply<false>(k16 % 2);
            }
        }
    }
};

template <class Type, class Codes, int kRows>
KRASIS_KERNEL((MmaTile<Type, Codes, kRows>::kThreads), (MmaTile<Type, Codes, kRows>::kBlocksAtOnce))
moe_mma_kernel(const MoeGemmParams p) {
    run_tiles<MmaWorker<MmaTile<Type, Codes, kRows>>>(p);
}

}  // namespace krasis::cuda
