// marlin_wgmma.cuh: the grouped W4A16 product by wgmma (sm_90a), 128 rows a tile; moe_worker.cuh says how it works.
//
// Two warpgroups; a warp takes the same word, 16 columns, of a pair of column tiles, and all rows: a dequantised
// fragment is used once, by an instruction for all of them. Fragments go in through registers, activations from shared
// memory as they lie: the swizzle that serves ldmatrix is the hardware's. Where the second half of a tile's rows is
// padding, the products are those of 64 rows.
//
// Order. The two tiles of the pair take turns, 32 k at a time: while the products of one are under way, the other's
// next fragments are dequantised. Where a group ends the warpgroup waits for all its products, for then its sums change
// units. So that the tensor cores have work meanwhile, the second warpgroup is a step behind the first (kLag).
#pragma once

#include "moe_tiles.cuh"

namespace krasis::cuda {

template <class Type_, class Codes_>
struct WgmmaTile : MoeTile<128, 256, 7, Codes_::kHasBlockScales ? 1024 : 0> {
    using Type = Type_;
    using Codes = Codes_;
    static constexpr int kWords = 1;
    static constexpr int kRowTiles = WgmmaTile::kRows / 8;
    static constexpr int kLag = 1;
    // A stage is refilled when the step behind the slower warpgroup's has begun: its products are done by then.
    static constexpr int kAhead = WgmmaTile::kStages - 2 - kLag;
    static_assert(WgmmaTile::kStageBytes % 1024 == 0);  // a tile's rows begin at multiples of 1024
};

template <class Tile>
struct WgmmaWorker : MoeWorker<Tile> {
    using Type = typename Tile::Type;
    using Codes = typename Tile::Codes;
    using Base = MoeWorker<Tile>;
    using Base::first_word, Base::lane, Base::p, Base::pair, Base::read_stage, Base::shared, Base::sum;

    uint32_t fragments[2][2][4];  // [column tile of the pair][k16 of the running 32 k]

    KRASIS_DEVICE explicit WgmmaWorker(const MoeGemmParams &params) : Base(params) {}

    template <int kTiles>
    KRASIS_DEVICE void hold_sums() {
        KRASIS_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) simt::hold(sum[i / kTiles][0][i % kTiles][f]);
        }
    }

    // scales: of the tile's blocks.
    KRASIS_DEVICE void dequantize(int i, const uint32_t (&codes)[2][2], uint32_t scales) {
        KRASIS_UNROLL
        for (int k = 0; k < 2; ++k) {
            uint32_t w[2][2];
            if constexpr (Codes::kHasBlockScales) {
                dequantize_e2m1<Type>(codes[k][i], scales, w);
            } else {
                dequantize_word<Type>(codes[k][i], w);
            }
            KRASIS_UNROLL
            for (int f = 0; f < 4; ++f) {
                fragments[i][k][f] = w[f % 2][f / 2];
                simt::hold(fragments[i][k][f]);
            }
        }
    }

    // 32 k, from k16 step `first` of the stage on.
    template <int kTiles>
    KRASIS_DEVICE void multiply(int first) {
        const uint8_t *stage = shared + read_stage;
        const uint8_t *words =
            stage + Tile::kXBytes + first * Tile::kK16Bytes + 2 * pair * Tile::kTileBytes + lane * 16 + first_word * 4;
        uint32_t codes[2][2], scales[2] = {};  // [k16][column tile of the pair]
        KRASIS_UNROLL
        for (int k = 0; k < 2; ++k) {
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) {
                codes[k][i] = simt::shared_load<uint32_t>(words + k * Tile::kK16Bytes + i * Tile::kTileBytes);
            }
        }
        if constexpr (Codes::kHasBlockScales) {
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) scales[i] = this->block_scales(i, first);
        }
        KRASIS_UNROLL
        for (int i = 0; i < 2; ++i) {
            simt::wgmma_wait<1>();  // only the other tile's products are under way
            dequantize(i, codes, scales[i]);
            simt::wgmma_fence();
            KRASIS_UNROLL
            for (int k = 0; k < 2; ++k) {
                simt::wgmma(Type{}, reinterpret_cast<float (&)[kTiles][4]>(sum[i][0]), fragments[i][k], stage,
                            first + k);
            }
            simt::wgmma_commit();
        }
    }

    // All threads do this for every step and kLag more; a warpgroup multiplies after its own.
    KRASIS_DEVICE void begin_step(int step) {
        simt::cp_async_wait<Tile::kAhead - 1>();
        simt::fence_for_wgmma();
        simt::sync_threads();
        this->load_step(step + Tile::kAhead);
    }

    template <int kTiles>
    KRASIS_DEVICE void run_units(int lag) {
        const int units = 2 * p.k_steps;  // of 32 k
        const int group = !Codes::kHasBlockScales && p.group_shift ? 1 << (p.group_shift - 1) : units;
        for (int at = 0; at < units;) {
            // Before the first group too, where it changes nothing: were the sums touched on one of two ways here, the
            // compiler would let no products run behind the threads' backs.
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) this->template change_units<kTiles>(i, 0);
            this->load_scales();
            hold_sums<kTiles>();
            const int end = at + group;
            for (; at < end; ++at) {
                if (at % 2 == 0) begin_step(at / 2 + lag);
                multiply<kTiles>(at % 2 * 2);
                if (at % 2) this->advance(read_stage);
            }
            simt::wgmma_wait<0>();
            hold_sums<kTiles>();
        }
    }

    // After begin.
    KRASIS_DEVICE void run() {
        const int lag = pair ? Tile::kLag : 0;  // pair: the number of the warpgroup
        this->begin_units();
        for (int step = 0; step < lag; ++step) begin_step(step);
        if (this->slots_of(this->place)[Tile::kRows / 2] < 0) {
            run_units<Tile::kRowTiles / 2>(lag);
        } else {
            run_units<Tile::kRowTiles>(lag);
        }
        for (int step = lag; step < Tile::kLag; ++step) begin_step(p.k_steps + step);
        this->end_units();
        simt::sync_threads();  // nobody reads shared memory any more
    }
};

template <class Type, class Codes>
KRASIS_KERNEL((WgmmaTile<Type, Codes>::kThreads), 1)
moe_wgmma_kernel(const MoeGemmParams p) {
    run_tiles<WgmmaWorker<WgmmaTile<Type, Codes>>>(p);
}

}  // namespace krasis::cuda
