// index.cu: an index over tokens: what is kept of a token; checks and launches of the choice.
#include "index_best.cuh"
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int64_t kMostDim = 256, kMostSize = 32768, kMostKeys = int64_t{1} << 30;

KRASIS_DEVICE float sum_of_lanes(float value) {
    for (int distance = 16; distance; distance /= 2) value += simt::shuffle_xor(value, distance);
    return value;
}

struct Turned {
    float first, second;
};

KRASIS_DEVICE Turned turn(const krasis_cuda_index_args &p, int64_t position, int pair, float first, float second) {
    const int64_t at = position * (p.rotary_dims / 2) + pair;
    const float c = p.cos[at], s = p.sin[at];
    return {first * c - second * s, second * c + first * s};
}

// Channels of a pair of the rotated part: neighbours, or one of each half.
KRASIS_DEVICE int first_channel(const krasis_cuda_index_args &p, int pair) { return p.interleaved ? 2 * pair : pair; }
KRASIS_DEVICE int second_channel(const krasis_cuda_index_args &p, int pair) {
    return p.interleaved ? 2 * pair + 1 : static_cast<int>(p.rotary_dims / 2) + pair;
}

// One warp.
KRASIS_DEVICE void store_index_key(const krasis_cuda_index_args &p, int64_t row, int64_t position, uint8_t *cache,
                                   int lane) {
    const float *k = p.k + row * p.dim;
    float sum = 0, squares = 0;
    for (int i = lane; i < p.dim; i += 32) sum += k[i];
    const float mean = sum_of_lanes(sum) / static_cast<float>(p.dim);
    for (int i = lane; i < p.dim; i += 32) squares = simt::fused_multiply_add(k[i] - mean, k[i] - mean, squares);
    const float scale = simt::reciprocal_sqrt(sum_of_lanes(squares) / static_cast<float>(p.dim) + p.eps);
    auto normed = [&](int i) { return (k[i] - mean) * scale * load1(p.norm, i, p.norm_dtype) + p.bias[i]; };
    const int64_t at = position * p.dim;
    for (int i = lane; i < p.rotary_dims / 2; i += 32) {
        const int first = first_channel(p, i), second = second_channel(p, i);
        const Turned pair = turn(p, position, i, normed(first), normed(second));
        store1(cache, at + first, p.dtype, pair.first);
        store1(cache, at + second, p.dtype, pair.second);
    }
    for (int i = static_cast<int>(p.rotary_dims) + lane; i < p.dim; i += 32) store1(cache, at + i, p.dtype, normed(i));
}

// A warp a head of a row's query, and one more for its key.
KRASIS_KERNEL(kThreads, 1)
index_store_kernel(const krasis_cuda_index_args p) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    const int64_t item = static_cast<int64_t>(simt::block_x()) * kWarps + simt::thread_x() / 32;
    const int64_t heads = p.q ? p.heads : 0, row = item / (heads + 1), head = item % (heads + 1);
    if (row >= p.tokens) return;  // the whole warp
    const int64_t position = p.rows ? p.rows[row].position : p.start + row;
    // One given by the device could not be checked before the launch: nothing is written where it does not fit.
    if (position < 0 || position >= p.capacity || (p.rotary_dims && position >= p.max_positions)) return;
    if (head < heads) {
        float *q = p.q + (row * heads + head) * p.dim;
        for (int i = lane; i < p.rotary_dims / 2; i += 32) {
            float &first = q[first_channel(p, i)], &second = q[second_channel(p, i)];
            const Turned pair = turn(p, position, i, first, second);
            first = pair.first;
            second = pair.second;
        }
        return;
    }
    uint8_t *cache =
        p.rows ? static_cast<uint8_t *>(p.rows[row].values) + p.values_offset : static_cast<uint8_t *>(p.cache);
    store_index_key(p, row, position, cache, lane);
}

int32_t check_sizes(int64_t heads, int64_t dim, int64_t capacity) {
    if (heads <= 0 || dim <= 0 || capacity <= 0 || capacity > kMostKeys) return KRASIS_ERR_ARGUMENT;
    return dim % 16 || dim > kMostDim || heads > kMostSize / dim ? KRASIS_ERR_SHAPE : KRASIS_OK;
}

int32_t check(const krasis_cuda_index_args &a) {
    const bool tables = (a.cos && a.sin) || a.rotary_dims == 0;
    if (!a.k || !a.norm || !a.bias || !tables || !(a.rows || a.cache) || a.tokens < 0) return KRASIS_ERR_ARGUMENT;
    if (!is_16_bit(a.dtype) || !is_dtype(a.norm_dtype) || !(a.eps > 0)) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check_sizes(a.heads, a.dim, a.capacity)) return status;
    if (a.rotary_dims < 0 || a.rotary_dims % 2 || a.rotary_dims > a.dim) return KRASIS_ERR_SHAPE;
    if (a.rows) return KRASIS_OK;
    const int64_t end = a.start + a.tokens;
    const bool inside = a.start >= 0 && end <= a.capacity && (a.rotary_dims == 0 || end <= a.max_positions);
    return inside ? KRASIS_OK : KRASIS_ERR_RANGE;
}

int32_t check(const krasis_cuda_choose_args &a) {
    const bool pointers = a.q && a.weights && a.chosen && a.scores && (a.rows || a.cache);
    if (!pointers || a.tokens < 0 || a.start < 0 || a.budget <= 0 || a.budget > kMostKeys || !is_16_bit(a.dtype))
        return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check_sizes(a.heads, a.dim, a.capacity)) return status;
    if (!is_aligned(a.cache) || !is_aligned(a.scores) || a.values_offset % 16 || a.score_columns % 4)
        return KRASIS_ERR_SHAPE;
    const int64_t longest = a.rows ? a.capacity : a.start + a.tokens;
    return longest <= a.capacity && longest <= a.score_columns ? KRASIS_OK : KRASIS_ERR_RANGE;
}

template <class Type, int kDim>
int32_t launch_scores(const krasis_cuda_choose_args &a, void *stream) {
    const int64_t blocks = a.tokens * ceil_div(a.score_columns, kScoreBlockKeys);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const simt::LaunchShape shape{static_cast<unsigned>(blocks), kScoreThreads, ScoreTile<Type, kDim>::kSharedBytes};
    return launch<index_scores_kernel<Type, kDim>>(shape, a, stream);
}

template <class Type>
int32_t launch_type(const krasis_cuda_choose_args &a, void *stream) {
    return a.dim <= 128 ? launch_scores<Type, 128>(a, stream) : launch_scores<Type, 256>(a, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_index_store(const krasis_cuda_index_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_index_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK) return status;
    const int64_t blocks = ceil_div(a.tokens * ((a.q ? a.heads : 0) + 1), kWarps);
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    return launch<index_store_kernel>({static_cast<unsigned>(blocks), kThreads, 0}, a, stream);
}

int32_t krasis_cuda_choose(const krasis_cuda_choose_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_choose_args &a = *args;
    int32_t status = check(a);
    if (status != KRASIS_OK || a.tokens == 0) return status;
    status = a.dtype == KRASIS_BF16 ? launch_type<krasis::Bf16>(a, stream) : launch_type<krasis::F16>(a, stream);
    if (status != KRASIS_OK) return status;
    return launch<index_best_kernel>({static_cast<unsigned>(a.tokens), kBestThreads, kBestSharedBytes}, a, stream);
}
