// mamba.cuh: what the kernels of Mamba-2 share: sizes, where rows and states lie.
#pragma once

#include "gated_delta.cuh"

namespace krasis::cuda {

inline constexpr int kMambaThreads = 256, kMambaPair = 2;
inline constexpr int64_t kMambaRun = 8;  // rows of a thread: as many as a convolution looks back at, or more
inline constexpr int kScanWarps = 4;     // a block: the columns of a tile, four a warp
inline constexpr int kScanPairs = 4;     // of rows of a matrix, that a lane holds
inline constexpr int kMostStates = kScanPairs * 2 * 32;
static_assert(kMambaRun >= kMaxConvWidth - 1);

KRASIS_BOTH int64_t mamba_inner(const krasis_cuda_mamba2_args &p) { return p.heads * p.head_dim; }
KRASIS_BOTH int64_t mamba_channels(const krasis_cuda_mamba2_args &p) {
    return mamba_inner(p) + 2 * p.groups * p.state_dim;
}

// first_row: the first of a sequence's rows. With a table each row is a sequence of its own.
KRASIS_DEVICE DeltaState mamba_state(const krasis_cuda_mamba2_args &p, int64_t first_row) {
    if (!p.rows) return {p.matrices, p.columns, p.start};
    const krasis_cuda_row row = p.rows[first_row];
    auto *base = static_cast<uint8_t *>(row.keys);
    return {reinterpret_cast<float *>(base + p.matrices_offset), reinterpret_cast<float *>(base + p.columns_offset),
            row.position};
}

}  // namespace krasis::cuda
