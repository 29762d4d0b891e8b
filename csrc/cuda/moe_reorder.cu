// moe_reorder.cu: rows of tokens in the order of the experts, and back to the order of the slots: what surrounds a
// library's grouped product. A warp a row, sixteen bytes a lane.
#include <algorithm>

#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int64_t kMostBlocks = 8192;

// What both directions know: rows of experts [expert_begin, expert_end), counted from the first's.
struct ReorderParams {
    const int32_t *sorted_slots, *first_block;
    const uint8_t *from;
    uint8_t *to;
    int64_t from_stride, to_stride, chunks, max_rows;  // in chunks of 16 bytes
    int32_t *ends;
    unsigned long long *num_executed;
    int32_t m_block, expert_begin, expert_end, slots_per_row;
};

KRASIS_DEVICE int64_t rows_until(const ReorderParams &p, int expert) {
    const int64_t rows = static_cast<int64_t>(p.first_block[expert] - p.first_block[p.expert_begin]) * p.m_block;
    return rows < p.max_rows ? rows : p.max_rows;
}

KRASIS_DEVICE const int32_t *first_slot(const ReorderParams &p) {
    return p.sorted_slots + static_cast<int64_t>(p.first_block[p.expert_begin]) * p.m_block;
}

KRASIS_DEVICE int64_t first_row() { return static_cast<int64_t>(simt::block_x()) * kWarps + simt::thread_x() / 32; }
KRASIS_DEVICE int64_t row_stride() { return static_cast<int64_t>(simt::num_blocks()) * kWarps; }

KRASIS_DEVICE void copy_row(const ReorderParams &p, int64_t to, int64_t from, bool valid) {
    const auto *source = reinterpret_cast<const simt::Words4 *>(p.from) + from * p.from_stride;
    auto *target = reinterpret_cast<simt::Words4 *>(p.to) + to * p.to_stride;
    KRASIS_UNROLL_BY(4)
    for (int64_t i = simt::thread_x() % 32; i < p.chunks; i += 32) target[i] = valid ? source[i] : simt::Words4{};
}

KRASIS_KERNEL(kThreads, 1)
moe_gather_kernel(const ReorderParams p) {
    const int64_t rows = rows_until(p, p.expert_end), stride = row_stride();
    const int32_t *slots = first_slot(p);
    for (int64_t row = first_row(); row < rows; row += stride) {
        const int slot = slots[row];
        copy_row(p, row, slot < 0 ? 0 : slot / p.slots_per_row, slot >= 0);
    }
    if (simt::block_x() > 0) return;
    for (int e = p.expert_begin + static_cast<int>(simt::thread_x()); e < p.expert_end; e += kThreads) {
        p.ends[e - p.expert_begin] = static_cast<int32_t>(rows_until(p, e + 1));
    }
}

KRASIS_KERNEL(kThreads, 1)
moe_scatter_kernel(const ReorderParams p) {
    const int64_t rows = rows_until(p, p.expert_end), stride = row_stride();
    const int32_t *slots = first_slot(p);
    unsigned long long count = 0;
    for (int64_t row = first_row(); row < rows; row += stride) {
        const int slot = slots[row];
        if (slot < 0) continue;
        copy_row(p, slot, row, true);
        ++count;
    }
    if (p.num_executed && count && simt::thread_x() % 32 == 0) simt::global_atomic_add(p.num_executed, count);
}

// As many as there can be rows; only the device knows how many there are.
unsigned num_blocks(int64_t num_slots, int64_t num_experts, int32_t m_block, int64_t max_rows) {
    const int64_t rows = krasis_cuda_align_max_blocks(num_slots, num_experts, m_block) * m_block;
    return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(std::min(rows, max_rows), kWarps), 1, kMostBlocks));
}

template <class Args>
int32_t check(const Args &a, const void *from, const void *to, int64_t columns, int64_t stride) {
    const bool counts = a.num_slots >= 0 && a.num_slots <= INT32_MAX && a.max_rows >= 0 && a.max_rows <= INT32_MAX;
    const bool sizes = a.m_block > 0 && columns > 0 && columns <= INT32_MAX;
    if (!from || !to || !a.sorted_slots || !a.first_block || !counts || !sizes || !is_16_bit(a.dtype)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (a.expert_begin < 0 || a.expert_begin > a.expert_end) return KRASIS_ERR_RANGE;
    if (columns % 8 || stride < columns || stride % 8 || !is_aligned(from) || !is_aligned(to)) return KRASIS_ERR_SHAPE;
    return KRASIS_OK;
}

template <class Args>
ReorderParams parameters(const Args &a, const void *from, void *to, int64_t columns) {
    ReorderParams p{};
    p.sorted_slots = a.sorted_slots;
    p.first_block = a.first_block;
    p.from = static_cast<const uint8_t *>(from);
    p.to = static_cast<uint8_t *>(to);
    p.chunks = p.from_stride = p.to_stride = columns / 8;
    p.max_rows = a.max_rows;
    p.m_block = a.m_block;
    p.expert_begin = a.expert_begin;
    p.expert_end = a.expert_end;
    p.slots_per_row = 1;
    return p;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_moe_gather(const krasis_cuda_moe_gather_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_moe_gather_args &a = *args;
    if (!a.ends || a.slots_per_row <= 0 || a.slots_per_row > INT32_MAX) return KRASIS_ERR_ARGUMENT;
    const int32_t status = check(a, a.x, a.out, a.k, a.x_stride);
    if (status != KRASIS_OK || a.expert_begin == a.expert_end) return status;
    ReorderParams p = parameters(a, a.x, a.out, a.k);
    p.from_stride = a.x_stride / 8;
    p.slots_per_row = static_cast<int32_t>(a.slots_per_row);
    p.ends = a.ends;
    const unsigned blocks = num_blocks(a.num_slots, a.expert_end - a.expert_begin, a.m_block, a.max_rows);
    return launch<moe_gather_kernel>({blocks, kThreads, 0}, p, stream);
}

int32_t krasis_cuda_moe_scatter(const krasis_cuda_moe_scatter_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_moe_scatter_args &a = *args;
    const int32_t status = check(a, a.rows, a.out, a.n, a.out_stride);
    if (status != KRASIS_OK || a.expert_begin == a.expert_end) return status;
    ReorderParams p = parameters(a, a.rows, a.out, a.n);
    p.to_stride = a.out_stride / 8;
    p.num_executed = reinterpret_cast<unsigned long long *>(a.num_executed);
    const unsigned blocks = num_blocks(a.num_slots, a.expert_end - a.expert_begin, a.m_block, a.max_rows);
    return launch<moe_scatter_kernel>({blocks, kThreads, 0}, p, stream);
}
