// mamba_scan.cuh: the Mamba-2 scan, row after row, and the gated norm of what it gives.
//
// A block takes 16 columns of a head's matrix, as they lie together, of one sequence; a warp four of them, of which
// each lane has up to eight rows in registers. Columns do not depend on each other, so nothing waits for another warp.
// The next row is loaded while the last is computed.
#pragma once

#include "mamba.cuh"

namespace krasis::cuda {

// What a lane needs of one row: its rows' b and c, its columns' u, the head's step.
struct ScanRow {
    float b[kScanPairs][2], c[kScanPairs][2], u[4], step;

    KRASIS_DEVICE void load(const krasis_cuda_mamba2_args &p, int64_t row, int64_t head, int64_t column, int lane) {
        const int64_t base = row * mamba_channels(p);
        const int64_t at_b = base + mamba_inner(p) + head / (p.heads / p.groups) * p.state_dim;
        const int64_t at_c = at_b + p.groups * p.state_dim;
        KRASIS_UNROLL
        for (int i = 0; i < kScanPairs; ++i) {
            const int state = 2 * lane + 64 * i;
            b[i][0] = b[i][1] = c[i][0] = c[i][1] = 0;
            if (state >= p.state_dim) continue;
            load_pair(p.mixed, at_b + state, p.dtype, b[i]);
            load_pair(p.mixed, at_c + state, p.dtype, c[i]);
        }
        float low[2], high[2];
        load_pair(p.mixed, base + head * p.head_dim + column, p.dtype, low);
        load_pair(p.mixed, base + head * p.head_dim + column + 2, p.dtype, high);
        u[0] = low[0];
        u[1] = low[1];
        u[2] = high[0];
        u[3] = high[1];
        step = p.steps[row * p.heads + head];
    }
};

// A lane's part of four columns of a matrix.
struct ScanPart {
    float rows[kScanPairs][2][4];

    // from: the four columns of the tile's first row.
    KRASIS_DEVICE void load(const float *from, int64_t state_dim, int lane, bool is_zero) {
        KRASIS_UNROLL
        for (int i = 0; i < 2 * kScanPairs; ++i) {
            const int state = 2 * lane + 64 * (i / 2) + i % 2;
            simt::Words4 words{};
            if (state < state_dim && !is_zero) {
                words = *reinterpret_cast<const simt::Words4 *>(from + state * kDeltaTile);
            }
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) rows[i / 2][i % 2][j] = bits_float(words.w[j]);
        }
    }

    KRASIS_DEVICE void store(float *to, int64_t state_dim, int lane) const {
        KRASIS_UNROLL
        for (int i = 0; i < 2 * kScanPairs; ++i) {
            const int state = 2 * lane + 64 * (i / 2) + i % 2;
            if (state >= state_dim) continue;
            simt::Words4 words;
            KRASIS_UNROLL
            for (int j = 0; j < 4; ++j) words.w[j] = float_bits(rows[i / 2][i % 2][j]);
            *reinterpret_cast<simt::Words4 *>(to + state * kDeltaTile) = words;
        }
    }

    // One row of the sequence; sums: the lane's part of what is read.
    KRASIS_DEVICE void step(const ScanRow &in, float kept, float (&sums)[4]) {
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float added = in.step * in.u[j];
            sums[j] = 0;
            KRASIS_UNROLL
            for (int i = 0; i < 2 * kScanPairs; ++i) {
                float &cell = rows[i / 2][i % 2][j];
                cell = simt::fused_multiply_add(in.b[i / 2][i % 2], added, kept * cell);
                sums[j] = simt::fused_multiply_add(in.c[i / 2][i % 2], cell, sums[j]);
            }
        }
    }
};

// The sum over all lanes of column lane / 8: halves are exchanged, so that six shuffles do for four columns.
KRASIS_DEVICE float sum_of_column(const float (&sums)[4], int lane) {
    const bool upper = lane & 16, odd = lane & 8;
    const float low = (upper ? sums[2] : sums[0]) + simt::shuffle_xor(upper ? sums[0] : sums[2], 16);
    const float high = (upper ? sums[3] : sums[1]) + simt::shuffle_xor(upper ? sums[1] : sums[3], 16);
    return lane_sum((odd ? high : low) + simt::shuffle_xor(odd ? low : high, 8), 1, 4);
}

KRASIS_KERNEL((32 * kScanWarps), 1)
mamba_scan_kernel(const krasis_cuda_mamba2_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t tiles = p.head_dim / kDeltaTile, block = simt::block_x();
    const int64_t tile = block % tiles, head = block / tiles % p.heads, sequence = block / tiles / p.heads;
    const int64_t first = p.rows ? sequence : 0, count = p.rows ? 1 : p.tokens;
    const DeltaState state = mamba_state(p, first);
    if (state.start < 0) return;  // the whole block
    const int64_t column = tile * kDeltaTile + 4 * warp;
    float *own = state.matrices + (head * tiles + tile) * p.state_dim * kDeltaTile + 4 * warp;
    const float rate = -simt::exp_float(p.a_log[head]), skip = p.skip[head];
    ScanPart part;
    part.load(own, p.state_dim, lane, state.start == 0);
    ScanRow next;
    next.load(p, first, head, column, lane);
    for (int64_t t = 0; t < count; ++t) {
        const ScanRow now = next;
        const int64_t row = first + t;
        if (t + 1 < count) next.load(p, row + 1, head, column, lane);
        float sums[4];
        part.step(now, simt::exp_float(rate * now.step), sums);
        const float sum = sum_of_column(sums, lane);
        const float u = lane & 16 ? (lane & 8 ? now.u[3] : now.u[2]) : (lane & 8 ? now.u[1] : now.u[0]);
        if (lane % 8 == 0) {
            const int64_t to = row * mamba_inner(p) + head * p.head_dim + column + lane / 8;
            p.scanned[to] = simt::fused_multiply_add(skip, u, sum);
        }
    }
    part.store(own, p.state_dim, lane);
}

// A warp a group of a row.
KRASIS_KERNEL(kMambaThreads, 1)
mamba_norm_kernel(const krasis_cuda_mamba2_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    const int64_t task = static_cast<int64_t>(simt::block_x()) * (kMambaThreads / 32) + simt::thread_x() / 32;
    const int64_t row = task / p.groups, group = task % p.groups, width = mamba_inner(p) / p.groups;
    if (row >= p.tokens || (p.rows && p.rows[row].position < 0)) return;  // the whole warp
    const int64_t first = group * width, at = row * mamba_inner(p) + first, at_z = row * p.ldx + first;
    float square = 0;
    for (int64_t i = 2 * lane; i < width; i += 64) {
        float z[2];
        load_pair(p.x, at_z + i, p.dtype, z);
        KRASIS_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float gated = p.scanned[at + i + j] * (z[j] * delta_sigmoid(z[j]));
            square = simt::fused_multiply_add(gated, gated, square);
        }
    }
    const float scale = simt::reciprocal_sqrt(lane_sum(square, 1, 16) / static_cast<float>(width) + p.eps);
    for (int64_t i = 2 * lane; i < width; i += 64) {
        float z[2], out[2];
        load_pair(p.x, at_z + i, p.dtype, z);
        KRASIS_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float gated = p.scanned[at + i + j] * (z[j] * delta_sigmoid(z[j]));
            out[j] = gated * scale * load1(p.gate_norm, first + i + j, p.norm_dtype);
        }
        *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(p.out) + at + i) = pack_pair(p.dtype, out[0], out[1]);
    }
}

}  // namespace krasis::cuda
