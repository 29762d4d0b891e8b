// mamba.cu: Mamba-2: its convolution and steps, checks and launches.
#include "mamba_scan.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

// The rows of one sequence in a call, as two channels see them.
struct MambaRows {
    const krasis_cuda_mamba2_args &p;
    DeltaState state;
    int64_t first_row, count, channel;

    // A row before the convolution, counted from the first on; below 0: before it.
    KRASIS_DEVICE void load(int64_t row, float (&pair)[kMambaPair]) const {
        pair[0] = pair[1] = 0;
        if (row >= 0) {
            load_pair(p.x, (first_row + row) * p.ldx + mamba_inner(p) + channel, p.dtype, pair);
        } else if (state.start > 0) {
            const float *column = state.columns + (p.conv_width - 1 + row) * mamba_channels(p) + channel;
            pair[0] = column[0];
            pair[1] = column[1];
        }
    }

    // The last rows before the next call, the oldest first. A column is read before it is written.
    KRASIS_DEVICE void keep() const {
        const int64_t before = p.conv_width - 1;
        for (int64_t j = 0; j < before; ++j) {
            float pair[kMambaPair];
            load(count - before + j, pair);
            float *column = state.columns + j * mamba_channels(p) + channel;
            column[0] = pair[0];
            column[1] = pair[1];
        }
    }
};

KRASIS_BOTH int64_t conv_tasks(const krasis_cuda_mamba2_args &p) {
    const int64_t runs = p.rows ? p.tokens : (p.tokens + kMambaRun - 1) / kMambaRun;
    return runs * (mamba_channels(p) / kMambaPair);
}

KRASIS_DEVICE void mamba_step(const krasis_cuda_mamba2_args &p, int64_t cell) {
    const float x = p.steps[cell] + p.dt_bias[cell % p.heads];
    const float step = x > 20.0f ? x : simt::log1p_float(simt::exp_float(x));
    p.steps[cell] = step < p.min_step ? p.min_step : step;
}

// Two channels a thread, over a run of rows; the thread of a sequence's first run alone reads its columns, and so it
// may overwrite them. Threads after these take a step each.
KRASIS_KERNEL(kMambaThreads, 1)
mamba_conv_kernel(const krasis_cuda_mamba2_args p) {
    const int64_t pairs = mamba_channels(p) / kMambaPair, length = p.rows ? 1 : kMambaRun;
    const int64_t task = static_cast<int64_t>(simt::block_x()) * kMambaThreads + simt::thread_x();
    if (task >= conv_tasks(p)) {
        if (task - conv_tasks(p) < p.tokens * p.heads) mamba_step(p, task - conv_tasks(p));
        return;
    }
    const int64_t first = task / pairs * length, channel = task % pairs * kMambaPair;
    const int64_t last = first + length < p.tokens ? first + length : p.tokens;
    const MambaRows rows{p, mamba_state(p, first), p.rows ? first : 0, p.rows ? 1 : p.tokens, channel};
    if (rows.state.start < 0) return;
    float taps[kMaxConvWidth][kMambaPair], past[kMaxConvWidth][kMambaPair];  // the newest row's last
    KRASIS_UNROLL
    for (int j = 0; j < kMaxConvWidth; ++j) {
        const int64_t tap = j - (kMaxConvWidth - p.conv_width);
        taps[j][0] = taps[j][1] = past[j][0] = past[j][1] = 0;
        if (tap < 0) continue;
        taps[j][0] = p.conv[channel * p.conv_width + tap];
        taps[j][1] = p.conv[(channel + 1) * p.conv_width + tap];
        if (j + 1 < kMaxConvWidth) rows.load(first - rows.first_row - (kMaxConvWidth - 1 - j), past[j]);
    }
    for (int64_t row = first; row < last; ++row) {
        rows.load(row - rows.first_row, past[kMaxConvWidth - 1]);
        float sum[kMambaPair];
        KRASIS_UNROLL
        for (int i = 0; i < kMambaPair; ++i) {
            sum[i] = p.conv_bias ? p.conv_bias[channel + i] : 0.0f;
            KRASIS_UNROLL
            for (int j = 0; j < kMaxConvWidth; ++j) sum[i] = simt::fused_multiply_add(past[j][i], taps[j][i], sum[i]);
            sum[i] *= delta_sigmoid(sum[i]);
            // Those that no tap looks at stay 0.
            KRASIS_UNROLL
            for (int j = 0; j + 1 < kMaxConvWidth; ++j) {
                past[j][i] = j + p.conv_width >= kMaxConvWidth ? past[j + 1][i] : 0;
            }
        }
        auto *to = static_cast<uint16_t *>(p.mixed) + row * mamba_channels(p) + channel;
        *reinterpret_cast<uint32_t *>(to) = pack_pair(p.dtype, sum[0], sum[1]);
    }
    if (first == 0 || p.rows) rows.keep();
}

int32_t check_mamba(const krasis_cuda_mamba2_args &a) {
    const bool counts = a.tokens >= 0 && a.heads > 0 && a.head_dim > 0 && a.state_dim > 0 && a.groups > 0 &&
                        a.conv_width > 0 && a.start >= 0;
    const bool kinds = is_16_bit(a.dtype) && is_dtype(a.norm_dtype);
    const bool arrays =
        a.x && a.steps && a.mixed && a.scanned && a.out && a.conv && a.a_log && a.dt_bias && a.skip && a.gate_norm;
    if (!counts || !kinds || !arrays || !(a.rows || (a.matrices && a.columns))) return KRASIS_ERR_ARGUMENT;
    constexpr int64_t kMost = 1 << 16;
    const bool heads = a.heads <= kMost && a.head_dim <= kMost && a.groups <= a.heads && a.heads % a.groups == 0;
    const bool dims = a.head_dim % kDeltaTile == 0 && a.state_dim % 2 == 0 && a.state_dim <= kMostStates &&
                      a.conv_width <= kMaxConvWidth;
    const bool aligned = is_aligned(a.x) && is_aligned(a.mixed) && is_aligned(a.scanned) && is_aligned(a.out) &&
                         is_aligned(a.matrices) && is_aligned(a.columns) && a.matrices_offset % 16 == 0 &&
                         a.columns_offset % 16 == 0;
    if (!heads || !dims || !aligned) return KRASIS_ERR_SHAPE;
    if (a.ldx % 8 != 0 || a.ldx < mamba_inner(a) + mamba_channels(a)) return KRASIS_ERR_SHAPE;
    const int64_t threads = conv_tasks(a) + a.tokens * a.heads, tiles = a.heads * (a.head_dim / kDeltaTile);
    if (a.tokens > kMaxBlocks || threads > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return (a.rows ? a.tokens : 1) > kMaxBlocks / tiles ? KRASIS_ERR_ARGUMENT : KRASIS_OK;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_mamba2(const krasis_cuda_mamba2_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_mamba2_args &a = *args;
    int32_t status = check_mamba(a);
    if (status != KRASIS_OK || a.tokens == 0) return status;
    const auto mixes = static_cast<unsigned>(ceil_div(conv_tasks(a) + a.tokens * a.heads, kMambaThreads));
    status = launch<mamba_conv_kernel>({mixes, kMambaThreads, 0}, a, stream);
    if (status != KRASIS_OK) return status;
    const auto tiles = static_cast<unsigned>(a.heads * (a.head_dim / kDeltaTile) * (a.rows ? a.tokens : 1));
    status = launch<mamba_scan_kernel>({tiles, 32 * kScanWarps, 0}, a, stream);
    if (status != KRASIS_OK) return status;
    const auto norms = static_cast<unsigned>(ceil_div(a.tokens * a.groups, kMambaThreads / 32));
    return launch<mamba_norm_kernel>({norms, kMambaThreads, 0}, a, stream);
}
