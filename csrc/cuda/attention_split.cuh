// attention_split.cuh: the kernel of attention_decode.cuh.
#pragma once

#include "attention_decode.cuh"

namespace krasis::cuda {

// One block a split of a tile of heads of a row.
template <class Type, int kDim, bool kCodes, bool kRing>
KRASIS_KERNEL((AttentionTile<Type, kDim, kCodes>::kThreads), 2)
attention_split_kernel(const AttentionParams p) {
    simt::follow();
    const int row = static_cast<int>(simt::block_x()) / p.blocks_per_row;
    const int block = static_cast<int>(simt::block_x()) % p.blocks_per_row, split = block % p.splits;
    const Keys visible = visible_keys(p, row);
    const int count = visible.end - visible.begin;
    const Keys own = keys_of(split, count, p.splits);
    if (own.begin >= own.end) return;
    const bool only = active_splits(count, p.splits) == 1;
    AttentionWorker<AttentionTile<Type, kDim, kCodes>, kRing> worker(
        p, row, block / p.splits, {visible.begin + own.begin, visible.begin + own.end});
    worker.run();
    worker.share();
    worker.weigh_warps(split, only);
    worker.store(split, only);
}

}  // namespace krasis::cuda
