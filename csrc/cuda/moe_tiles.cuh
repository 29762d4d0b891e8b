// moe_tiles.cuh: which tiles of the grouped product a block takes, one after the other.
#pragma once

#include "moe_worker.cuh"

namespace krasis::cuda {

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

// All tiles of a block. Worker: with run, which adds up the tile begun and leaves shared memory free.
template <class Worker>
KRASIS_DEVICE void run_tiles(const MoeGemmParams &p) {
    MoeTiles tiles(p);
    Place at{}, ahead{};
    bool more = tiles.take(at);
    if (!more) return;
    Worker worker(p);
    worker.begin(at);
    while (more) {
        worker.run();
        more = tiles.take(ahead);
        if (more) worker.begin(ahead);
        worker.add_biases(at);
        worker.store(at);
        worker.count_executed(at);
        worker.clear_sums();
        at = ahead;
    }
}

}  // namespace krasis::cuda
