// moe_align.cu: sorts routed slots by expert, each expert padded to whole blocks of rows.
//
// A stable counting sort in two launches. One block counts, and lays out the experts; then one block an expert walks
// all ids and writes its own slots in order, with a prefix sum instead of atomics, so that the order is the same every
// time.
#include <algorithm>

#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kCountThreads = 1024;
constexpr int kPlaceThreads = 512, kPlaceWarps = kPlaceThreads / 32, kIdsPerThread = 4;
constexpr int kMaxExperts = 8192;

struct AlignParams {
    const int32_t *ids;
    int64_t num_slots;
    int32_t num_experts, m_block;
    int32_t *sorted_slots, *block_experts, *first_block, *counts, *num_invalid;
};

// Sum over the lanes up to and including this one.
KRASIS_DEVICE int inclusive_sum(int value) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = simt::shuffle_up(value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// shared: int32 [num_experts + 1]: counts, then first blocks; the last cell counts invalid ids.
KRASIS_KERNEL(kCountThreads, 1)
align_count_kernel(const AlignParams p) {
    simt::follow();
    auto *cells = reinterpret_cast<int32_t *>(simt::shared_memory());
    const int thread = static_cast<int>(simt::thread_x());
    for (int e = thread; e <= p.num_experts; e += kCountThreads) simt::shared_store(cells + e, 0);
    simt::sync_threads();
    for (int64_t i = thread; i < p.num_slots; i += kCountThreads) {
        const int id = p.ids[i];
        if (id >= 0 && id < p.num_experts) simt::shared_atomic_add(cells + id, 1);
        if (id < -1 || id >= p.num_experts) simt::shared_atomic_add(cells + p.num_experts, 1);
    }
    simt::sync_threads();
    if (thread == 0) *p.num_invalid = simt::shared_load<int32_t>(cells + p.num_experts);
    if (thread >= 32) return;
    int before = 0;  // blocks of the experts before these 32
    for (int begin = 0; begin < p.num_experts; begin += 32) {
        const int e = begin + thread;
        const int count = e < p.num_experts ? simt::shared_load<int32_t>(cells + e) : 0;
        const int blocks = (count + p.m_block - 1) / p.m_block;
        const int sum = inclusive_sum(blocks);
        if (e < p.num_experts) {
            p.counts[e] = count;
            p.first_block[e] = before + sum - blocks;
        }
        before += simt::shuffle(sum, 31);
    }
    if (thread == 0) p.first_block[p.num_experts] = before;
}

// One block an expert. shared: int32 [2][kPlaceWarps], double buffered: one barrier an iteration.
KRASIS_KERNEL(kPlaceThreads, 1)
align_place_kernel(const AlignParams p) {
    simt::follow();
    const int expert = static_cast<int>(simt::block_x());
    const int first = p.first_block[expert], last = p.first_block[expert + 1];
    if (first == last) return;
    auto *sums = reinterpret_cast<int32_t *>(simt::shared_memory());
    const int thread = static_cast<int>(simt::thread_x()), warp = thread / 32;
    for (int b = first + thread; b < last; b += kPlaceThreads) p.block_experts[b] = expert;
    int32_t *out = p.sorted_slots + static_cast<int64_t>(first) * p.m_block;
    int64_t placed = 0;
    int buffer = 0;
    for (int64_t begin = 0; begin < p.num_slots; begin += kPlaceThreads * kIdsPerThread, buffer ^= 1) {
        const int64_t own = begin + thread * kIdsPerThread;
        uint32_t matches = 0;
        for (int i = 0; i < kIdsPerThread; ++i) {
            if (own + i < p.num_slots && p.ids[own + i] == expert) matches |= 1u << i;
        }
        int count = 0;
        for (int i = 0; i < kIdsPerThread; ++i) count += matches >> i & 1;
        const int sum = inclusive_sum(count);
        if (thread % 32 == 31) simt::shared_store(sums + buffer * kPlaceWarps + warp, sum);
        simt::sync_threads();
        int64_t at = placed + sum - count;
        for (int w = 0; w < kPlaceWarps; ++w) {
            const int other = simt::shared_load<int32_t>(sums + buffer * kPlaceWarps + w);
            if (w < warp) at += other;
            placed += other;
        }
        for (int i = 0; i < kIdsPerThread; ++i) {
            if (matches >> i & 1) out[at++] = static_cast<int32_t>(own + i);
        }
    }
    const int64_t rows = static_cast<int64_t>(last - first) * p.m_block;
    for (int64_t row = placed + thread; row < rows; row += kPlaceThreads) out[row] = -1;
}

}  // namespace
}  // namespace krasis::cuda

// Padding costs up to m_block - 1 rows an expert: smaller blocks waste fewer rows, larger ones read the weights less
// often. Blocks of 128 are for wgmma, which is the faster from half a block on; mma.sync is no faster with them.
int32_t krasis_cuda_moe_m_block(int64_t num_slots, int64_t num_experts) {
    if (num_experts <= 0 || num_slots <= 16 * num_experts) return 16;
    if (num_slots <= 32 * num_experts) return 32;
    return num_slots <= 64 * num_experts || !krasis::simt::has_wgmma() ? 64 : 128;
}

// Full blocks of all slots, and one that is not full for each expert that has slots.
int64_t krasis_cuda_align_max_blocks(int64_t num_slots, int64_t num_experts, int32_t m_block) {
    if (num_slots <= 0 || num_experts <= 0 || m_block <= 0) return 0;
    return (num_slots + std::min(num_slots, num_experts) * (m_block - 1)) / m_block;
}

int32_t krasis_cuda_moe_align(const krasis_cuda_align_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_align_args &a = *args;
    const bool slots = a.num_slots == 0 || (a.ids && a.sorted_slots && a.block_experts);
    const bool pointers = slots && a.first_block && a.counts && a.num_invalid;
    if (!pointers || a.num_slots < 0 || a.num_slots > INT32_MAX) return KRASIS_ERR_ARGUMENT;
    if (a.num_experts <= 0 || a.num_experts > kMaxExperts) return KRASIS_ERR_RANGE;
    if (a.m_block != 16 && a.m_block != 32 && a.m_block != 64 && a.m_block != 128) return KRASIS_ERR_SHAPE;
    const AlignParams params{a.ids,           a.num_slots,   a.num_experts, a.m_block,    a.sorted_slots,
                             a.block_experts, a.first_block, a.counts,      a.num_invalid};
    const auto experts = static_cast<unsigned>(a.num_experts);
    const int32_t status =
        launch_beside<align_count_kernel>({1, kCountThreads, (experts + 1) * sizeof(int32_t)}, params, stream);
    if (status != KRASIS_OK) return status;
    return launch_beside<align_place_kernel>({experts, kPlaceThreads, 2 * kPlaceWarps * sizeof(int32_t)}, params,
                                             stream);
}
