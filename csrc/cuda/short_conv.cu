// short_conv.cu: gated short convolutions.
#include "gated_delta.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256, kPair = 2;
constexpr int64_t kRun = 8;  // rows of a thread: as many as a convolution looks back at, or more
static_assert(kRun >= kMaxConvWidth - 1);

// The rows of one sequence in a call, as two channels see them.
struct ConvRows {
    const krasis_cuda_short_conv_args &p;
    float *columns;  // of the two channels
    int64_t start, first_row, count, channel;

    // Their product of a row, counted from the first on; below 0: before it.
    KRASIS_DEVICE void load(int64_t row, float (&product)[kPair]) const {
        product[0] = product[1] = 0;
        if (row >= 0) {
            const int64_t at = (first_row + row) * 3 * p.channels + channel;
            float x[kPair];
            load_pair(p.x, at, p.dtype, product);
            load_pair(p.x, at + 2 * p.channels, p.dtype, x);
            product[0] *= x[0];
            product[1] *= x[1];
        } else if (start > 0) {
            const float *column = columns + (p.width - 1 + row) * p.channels;
            product[0] = column[0];
            product[1] = column[1];
        }
    }

    // The last products before the next call, the oldest first. A column is read before it is written.
    KRASIS_DEVICE void keep() const {
        const int64_t before = p.width - 1;
        for (int64_t j = 0; j < before; ++j) {
            float product[kPair];
            load(count - before + j, product);
            columns[j * p.channels] = product[0];
            columns[j * p.channels + 1] = product[1];
        }
    }
};

// Two channels a thread, over a run of rows. The past of a sequence's first rows is in its columns; the thread of the
// first run alone reads them, and so it may overwrite them.
KRASIS_KERNEL(kThreads, 1)
short_conv_kernel(const krasis_cuda_short_conv_args p) {
    const int64_t pairs = p.channels / kPair, length = p.rows ? 1 : kRun;
    const int64_t task = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x();
    const int64_t first = task / pairs * length, channel = task % pairs * kPair;
    if (first >= p.tokens) return;
    const int64_t last = first + length < p.tokens ? first + length : p.tokens;
    ConvRows rows{p, p.rows ? nullptr : p.columns + channel, p.start, 0, p.tokens, channel};
    if (p.rows) {
        const krasis_cuda_row row = p.rows[first];
        if (row.position < 0) return;
        auto *base = static_cast<uint8_t *>(row.keys) + p.columns_offset;
        rows.columns = reinterpret_cast<float *>(base) + channel;
        rows.start = row.position;
        rows.first_row = first;
        rows.count = 1;
    }
    float taps[kMaxConvWidth][kPair], past[kMaxConvWidth][kPair];  // the newest row's last
    KRASIS_UNROLL
    for (int j = 0; j < kMaxConvWidth; ++j) {
        const int64_t tap = j - (kMaxConvWidth - p.width);
        taps[j][0] = taps[j][1] = past[j][0] = past[j][1] = 0;
        if (tap < 0) continue;
        taps[j][0] = p.conv[channel * p.width + tap];
        taps[j][1] = p.conv[(channel + 1) * p.width + tap];
        if (j + 1 < kMaxConvWidth) rows.load(first - rows.first_row - (kMaxConvWidth - 1 - j), past[j]);
    }
    for (int64_t row = first; row < last; ++row) {
        rows.load(row - rows.first_row, past[kMaxConvWidth - 1]);
        float gate[kPair], sum[kPair] = {};
        load_pair(p.x, row * 3 * p.channels + p.channels + channel, p.dtype, gate);
        KRASIS_UNROLL
        for (int i = 0; i < kPair; ++i) {
            KRASIS_UNROLL
            for (int j = 0; j < kMaxConvWidth; ++j) sum[i] = simt::fused_multiply_add(past[j][i], taps[j][i], sum[i]);
            // Those that no tap looks at stay 0.
            KRASIS_UNROLL
            for (int j = 0; j + 1 < kMaxConvWidth; ++j) past[j][i] = j + p.width >= kMaxConvWidth ? past[j + 1][i] : 0;
        }
        auto *to = static_cast<uint16_t *>(p.out) + row * p.channels + channel;
        *reinterpret_cast<uint32_t *>(to) = pack_pair(p.dtype, gate[0] * sum[0], gate[1] * sum[1]);
    }
    if (first == 0 || p.rows) rows.keep();
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_short_conv(const krasis_cuda_short_conv_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_short_conv_args &a = *args;
    const bool counts = a.tokens >= 0 && a.channels > 0 && a.width > 0 && a.start >= 0 && is_16_bit(a.dtype);
    if (!counts || !a.x || !a.out || !a.conv || !(a.rows || a.columns)) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(a.x) && is_aligned(a.out) && is_aligned(a.columns) && a.columns_offset % 16 == 0;
    if (a.channels % 8 != 0 || a.width > kMaxConvWidth || !aligned) return KRASIS_ERR_SHAPE;
    const int64_t runs = a.rows ? a.tokens : ceil_div(a.tokens, kRun);
    if (a.channels > kMaxBlocks || runs > kMaxBlocks) return KRASIS_ERR_SHAPE;
    const int64_t blocks = ceil_div(runs * (a.channels / kPair), kThreads);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return launch<short_conv_kernel>({static_cast<unsigned>(blocks), kThreads, 0}, a, stream);
}
