// move_positions.cu: keys and values of a sequence between the host's memory and a buffer in VRAM, while it is decoded:
// how many is known to the device alone, when the kernel runs.
#include <algorithm>

#include "status.h"

namespace krasis::cuda {
namespace {

// More than a link has under way: 32 blocks x 256 threads x 4 words of 16 bytes are 512 KiB.
constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kMostBlocks = 32;

struct Range {
    int64_t begin, end;
};

// The positions to copy, by the one that the row is at.
KRASIS_DEVICE Range range_of(const krasis_cuda_move_args &p) {
    const int64_t position = p.from_row->position;
    if (position < 0 || position >= p.capacity) return {0, 0};
    if (p.num_parts == 0) return {position, position + 1};
    const int64_t first = p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
    const int64_t count = position - first;
    return {first + count * p.part / p.num_parts, first + count * (p.part + 1) / p.num_parts};
}

// All threads of the grid; kUnroll words of a thread are under way at once.
template <class Word>
KRASIS_DEVICE void copy_words(uint8_t *to, const uint8_t *from, int64_t num_bytes) {
    const int64_t count = num_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t step = static_cast<int64_t>(simt::num_blocks()) * kThreads;
    for (int64_t i = static_cast<int64_t>(simt::block_x()) * kThreads + simt::thread_x(); i < count;
         i += kUnroll * step) {
        Word words[kUnroll]{};
        KRASIS_UNROLL
        for (int j = 0; j < kUnroll; ++j) {
            if (i + j * step < count) words[j] = reinterpret_cast<const Word *>(from)[i + j * step];
        }
        KRASIS_UNROLL
        for (int j = 0; j < kUnroll; ++j) {
            if (i + j * step < count) reinterpret_cast<Word *>(to)[i + j * step] = words[j];
        }
    }
}

KRASIS_DEVICE void move_rows(const krasis_cuda_move_args &p, const Range &range, void *to_slot, int64_t to_offset,
                             const void *from_slot, int64_t from_offset, int64_t row_bytes) {
    if (row_bytes == 0) return;
    auto *to = static_cast<uint8_t *>(to_slot) + to_offset;
    const auto *from = static_cast<const uint8_t *>(from_slot) + from_offset;
    const int64_t count = range.end - range.begin, scales = p.num_kv_heads * p.capacity * row_bytes;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        const int64_t row = head * p.capacity + range.begin;
        copy_words<simt::Words4>(to + row * row_bytes, from + row * row_bytes, count * row_bytes);
        if (p.has_scales) copy_words<uint32_t>(to + scales + 4 * row, from + scales + 4 * row, 4 * count);
    }
}

KRASIS_KERNEL(kThreads, 1)
move_kernel(const krasis_cuda_move_args p) {
    simt::follow();
    const Range range = range_of(p);
    if (range.begin >= range.end) return;
    move_rows(p, range, p.to_row->keys, p.to_keys, p.from_row->keys, p.from_keys, p.key_bytes);
    move_rows(p, range, p.to_row->values, p.to_values, p.from_row->values, p.from_values, p.value_bytes);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_move_positions(const krasis_cuda_move_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_move_args &a = *args;
    const bool counts = a.num_kv_heads > 0 && a.capacity > 0 && a.key_bytes > 0 && a.value_bytes >= 0 && a.window >= 0;
    if (!a.from_row || !a.to_row || !counts || a.num_parts < 0 || a.part < 0) return KRASIS_ERR_ARGUMENT;
    if (a.num_parts > 0 && a.part >= a.num_parts) return KRASIS_ERR_ARGUMENT;
    const bool aligned =
        a.from_keys % 16 == 0 && a.from_values % 16 == 0 && a.to_keys % 16 == 0 && a.to_values % 16 == 0;
    if (a.key_bytes % 16 || a.value_bytes % 16 || !aligned) return KRASIS_ERR_SHAPE;
    const int64_t positions = a.num_parts == 0 ? 1 : ceil_div(a.capacity, a.num_parts);
    const int64_t words = positions * std::max(a.key_bytes, a.value_bytes) / 16;
    const auto blocks = static_cast<unsigned>(std::min(ceil_div(words, kThreads), kMostBlocks));
    return launch_beside<move_kernel>({blocks, kThreads, 0}, a, stream);
}
