// hashed_table.cu: what the rows of a hashed n-gram table add to residual streams.
#include <algorithm>

#include "row_norm.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostTaps = 64, kMostDilation = 64;
enum Sum { kKeys, kQueries, kProducts, kValues, kSums };

KRASIS_DEVICE float sigmoid(float x) { return simt::divide(1.0f, 1.0f + simt::exp_float(-x)); }

// One block a stream of a row. shared: float [kSums][kNormWarps].
KRASIS_KERNEL(kNormThreads, 1)
table_weigh_kernel(const krasis_cuda_table_weigh_args p) {
    simt::follow();
    const int64_t cell = simt::block_x(), at = cell * p.k, own = cell % p.streams * p.k, row = cell / p.streams * p.k;
    const int thread = static_cast<int>(simt::thread_x());
    auto *shared = reinterpret_cast<float *>(simt::shared_memory());
    float sums[kSums] = {};
    for (int64_t i = thread * kVector; i < p.k; i += kNormThreads * kVector) {
        float keys[kVector], queries[kVector], values[kVector], key_norm[kVector], query_norm[kVector];
        load8(p.keys, at + i, KRASIS_F32, keys);
        load8(p.x, at + i, KRASIS_F32, queries);
        load8(p.values, row + i, KRASIS_F32, values);
        load8(p.key_norm, own + i, p.norm_dtype, key_norm);
        load8(p.query_norm, own + i, p.norm_dtype, query_norm);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) {
            const float product = keys[j] * key_norm[j] * (queries[j] * query_norm[j]);
            sums[kKeys] = simt::fused_multiply_add(keys[j], keys[j], sums[kKeys]);
            sums[kQueries] = simt::fused_multiply_add(queries[j], queries[j], sums[kQueries]);
            sums[kValues] = simt::fused_multiply_add(values[j], values[j], sums[kValues]);
            sums[kProducts] += product;
        }
    }
    KRASIS_UNROLL
    for (int n = 0; n < kSums; ++n) {
        const float whole = warp_sum(sums[n]);
        if (thread % 32 == 0) simt::shared_store(shared + n * kNormWarps + thread / 32, whole);
    }
    simt::sync_threads();
    KRASIS_UNROLL
    for (int n = 0; n < kSums; ++n) {
        sums[n] = 0;
        KRASIS_UNROLL
        for (int w = 0; w < kNormWarps; ++w) sums[n] += simt::shared_load<float>(shared + n * kNormWarps + w);
    }
    const auto k = static_cast<float>(p.k);
    const float scales =
        simt::reciprocal_sqrt(sums[kKeys] / k + p.eps) * simt::reciprocal_sqrt(sums[kQueries] / k + p.eps);
    const float product = simt::divide(sums[kProducts] * scales, simt::square_root(k));
    const float size = product < 0 ? -product : product, root = simt::square_root(size > 1e-6f ? size : 1e-6f);
    const float gate = sigmoid(product > 0 ? root : product < 0 ? -root : 0.0f);
    const float scale = simt::reciprocal_sqrt(gate * gate * (sums[kValues] / k) + p.eps);
    for (int64_t i = thread * kVector; i < p.k; i += kNormThreads * kVector) {
        float values[kVector], conv_norm[kVector];
        load8(p.values, row + i, KRASIS_F32, values);
        load8(p.conv_norm, own + i, p.norm_dtype, conv_norm);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] *= gate;
        store8(p.gated, at + i, KRASIS_F32, values);
        KRASIS_UNROLL
        for (int j = 0; j < kVector; ++j) values[j] = values[j] * scale * conv_norm[j];
        store8(p.normed, at + i, KRASIS_F32, values);
    }
}

// The rows of a sequence in a call, as a channel sees them.
struct TableRows {
    const float *normed;  // of its first row
    float *past;
    int64_t start, channels, num_past;

    // Counted from the first row on; below 0: before it.
    KRASIS_DEVICE float value(int64_t row) const {
        if (row >= 0) return normed[row * channels];
        return start > 0 ? past[(num_past + row) * channels] : 0.0f;
    }
};

KRASIS_DEVICE TableRows rows_of(const krasis_cuda_table_add_args &p, int64_t row, int64_t channel) {
    const int64_t num_past = (p.width - 1) * p.dilation;
    if (!p.rows) return {p.normed + channel, p.past + channel, p.start, p.channels, num_past};
    auto *past = reinterpret_cast<float *>(static_cast<uint8_t *>(p.rows[row].keys) + p.past_offset);
    return {p.normed + row * p.channels + channel, past + channel, p.rows[row].position, p.channels, num_past};
}

// A channel of a row a thread.
KRASIS_KERNEL(kThreads, 1)
table_add_kernel(const krasis_cuda_table_add_args p) {
    simt::follow();
    const int64_t cell = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x();
    const int64_t row = cell / p.channels, channel = cell % p.channels;
    if (row >= p.tokens || (p.rows && p.rows[row].position < 0)) return;
    const TableRows own = rows_of(p, row, channel);
    const int64_t at = p.rows ? 0 : row;
    float sum = 0;
    for (int64_t j = 0; j < p.width; ++j) {
        const float tap = p.conv[channel * p.width + j];
        sum = simt::fused_multiply_add(tap, own.value(at - (p.width - 1 - j) * p.dilation), sum);
    }
    p.x[cell] += p.gated[cell] + sum * sigmoid(sum);
}

// A channel of a sequence a thread: what the next call finds as its past. A row of it is read before it is written.
KRASIS_KERNEL(kThreads, 1)
table_keep_kernel(const krasis_cuda_table_add_args p) {
    simt::follow();
    const int64_t cell = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x();
    const int64_t row = cell / p.channels, channel = cell % p.channels;
    if (row >= (p.rows ? p.tokens : 1) || (p.rows && p.rows[row].position < 0)) return;
    const TableRows own = rows_of(p, row, channel);
    const int64_t count = p.rows ? 1 : p.tokens;
    for (int64_t j = 0; j < own.num_past; ++j) {
        own.past[j * own.channels] = own.value(count - own.num_past + j);
    }
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_table_weigh(const krasis_cuda_table_weigh_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_table_weigh_args &a = *args;
    const bool sizes = a.tokens >= 0 && a.streams > 0 && a.k > 0 && a.tokens <= kMaxBlocks / a.streams;
    const bool present = a.x && a.keys && a.values && a.key_norm && a.query_norm && a.conv_norm && a.gated && a.normed;
    if (!sizes || !present || !is_dtype(a.norm_dtype)) return KRASIS_ERR_ARGUMENT;
    bool aligned = true;
    for (const void *one : {static_cast<const void *>(a.x), static_cast<const void *>(a.keys),
                            static_cast<const void *>(a.values), a.key_norm, a.query_norm, a.conv_norm,
                            static_cast<const void *>(a.gated), static_cast<const void *>(a.normed)})
        aligned = aligned && is_aligned(one);
    if (a.k % kVector || !aligned) return KRASIS_ERR_SHAPE;
    const auto blocks = static_cast<unsigned>(a.tokens * a.streams);
    constexpr size_t kSharedBytes = kSums * kNormWarps * sizeof(float);
    return launch_rows<table_weigh_kernel>(a.tokens, {blocks, kNormThreads, kSharedBytes}, a, stream);
}

int32_t krasis_cuda_table_add(const krasis_cuda_table_add_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_table_add_args &a = *args;
    const bool sizes = a.tokens >= 0 && a.channels > 0 && a.width > 0 && a.dilation > 0 && a.start >= 0;
    if (!sizes || !a.x || !a.gated || !a.normed || !a.conv || !(a.rows || a.past)) return KRASIS_ERR_ARGUMENT;
    if (a.channels % kVector || a.width > kMostTaps || a.dilation > kMostDilation || a.past_offset % 16)
        return KRASIS_ERR_SHAPE;
    if (a.channels > kMaxBlocks || a.tokens > kMaxBlocks || a.tokens > kMaxBlocks / a.channels * kThreads)
        return KRASIS_ERR_SHAPE;
    if (a.tokens == 0) return KRASIS_OK;
    const auto blocks = static_cast<unsigned>(ceil_div(a.tokens * a.channels, kThreads));
    const int32_t status = launch_rows<table_add_kernel>(a.tokens, {blocks, kThreads, 0}, a, stream);
    if (status != KRASIS_OK || a.width == 1) return status;
    const auto keeping = static_cast<unsigned>(ceil_div((a.rows ? a.tokens : 1) * a.channels, kThreads));
    return launch_rows<table_keep_kernel>(a.tokens, {keeping, kThreads, 0}, a, stream);
}
