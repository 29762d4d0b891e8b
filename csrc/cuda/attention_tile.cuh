// attention_tile.cuh: what attention of few queries (attention_decode.cuh) is told, and how a block of it is cut.
#pragma once

#include <type_traits>

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kMaxSplits = 64, kHeads = 16, kMaxHeadDim = 512;
inline constexpr int kSplitKeys = 64;  // a split has a multiple of so many keys
inline constexpr int kStatistics = 2;  // of a split of a head: the maximum, and the sum of exponentials below it

struct AttentionParams {
    const uint8_t *q, *keys, *values;  // 16-bit, or keys and values codes of 8
    uint8_t *out;
    const int64_t *position;      // of the only row, if rows is null
    const krasis_cuda_row *rows;  // [num_rows]
    const float *sinks;           // [num_heads] or null
    float *sums;                  // [num_rows, num_heads, splits, head_dim]
    float *statistics;            // [num_rows, num_heads, splits, 2]
    // In bytes.
    int64_t keys_offset, values_offset, q_stride, out_stride, scales_offset;  // of scales: behind codes
    int32_t capacity, num_heads, heads_per_kv, head_tiles, head_dim, splits, window;
    int32_t blocks_per_row;
    float scale;
    int32_t ring;  // places of a head, where caches are rings
};

struct Keys {
    int begin, end;
};

// The keys that a row's query sees; a position outside of the cache counts as its nearest end.
KRASIS_DEVICE Keys visible_keys(const AttentionParams &p, int64_t row) {
    const int64_t position = p.rows ? p.rows[row].position : *p.position;
    const int end = position < 0 ? 0 : position < p.capacity ? static_cast<int>(position) + 1 : p.capacity;
    return {p.window && end > p.window ? end - p.window : 0, end};
}

KRASIS_DEVICE int keys_per_split(int count, int splits) { return ((count - 1) / splits / kSplitKeys + 1) * kSplitKeys; }

KRASIS_DEVICE int active_splits(int count, int splits) {
    return count == 0 ? 0 : (count - 1) / keys_per_split(count, splits) + 1;
}

// Empty for splits that have nothing to do.
KRASIS_DEVICE Keys keys_of(int split, int count, int splits) {
    if (count == 0) return {0, 0};
    const int each = keys_per_split(count, splits), begin = split * each;
    return {begin, begin + each < count ? begin + each : count};
}

inline constexpr float kLowest = -__builtin_inff();

// exp(x - maximum), where the maximum of nothing is kLowest.
KRASIS_DEVICE float weight_below(float x, float maximum) { return x == kLowest ? 0.0f : simt::exp_float(x - maximum); }

template <class Type_, int kDim_, bool kCodes_ = false>
struct AttentionTile {
    using Type = Type_;
    static constexpr bool kCodes = kCodes_;  // keys and values of 8 bits
    // Of probabilities: times scales of values they may leave fp16's range.
    using WeightType = std::conditional_t<kCodes, Bf16, Type>;
    static constexpr int kDim = kDim_;  // head_dim, rounded up; the rest is zeros
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    // A warp has the registers for sums of 128 columns.
    static constexpr int kParts = kDim > 128 ? kDim / 128 : 1, kPartColumns = kDim / kParts;
    static constexpr int kKeyWarps = kWarps / kParts, kKeys = 16 * kKeyWarps;  // of a stage
    static constexpr int kStages = 3;
    static constexpr int kItemBytes = kCodes ? 1 : 2, kChunkItems = 16 / kItemBytes;
    static constexpr int kRowBytes = kItemBytes * kDim, kRowChunks = kRowBytes / 16;
    static constexpr int kHalfBytes = kKeys * kRowBytes;           // keys, then values
    static constexpr int kSharedBytes = kStages * 2 * kHalfBytes;  // at most 96 KiB: what every target has
    static_assert(kSplitKeys % kKeys == 0);
    // What the warps leave for each other lies where the ring was: [key warp][head] rows of sums, so far apart that
    // neither stores nor loads meet in a bank; maxima and sums of exponentials, [key warp][head][2]; and each key
    // warp's weight, [head][key warp], beside the sum of a head.
    static constexpr int kSumFloats = kDim + 8;
    static constexpr int kStatisticsAt = kKeyWarps * kHeads * kSumFloats;
    static constexpr int kWeightsAt = kStatisticsAt + kKeyWarps * kHeads * kStatistics;
    static constexpr int kTotalsAt = kWeightsAt + kKeyWarps * kHeads;
    static_assert((kTotalsAt + kHeads) * 4 <= kSharedBytes);

    // Eight rows in a row of chunks must fall into different banks.
    KRASIS_DEVICE static int place(int row, int chunk) {
        constexpr int kLineRows = kRowChunks < 8 ? 8 / kRowChunks : 1;  // of 128 bytes
        return row * kRowBytes + (chunk ^ row / kLineRows % (8 / kLineRows)) * 16;
    }
};

// Two weights as 16-bit floats, and what that left of them.
template <class Type>
KRASIS_DEVICE void split_weights(float low, float high, uint32_t &coarse, uint32_t &rest) {
    coarse = pack2<Type>(low, high);
    rest = pack2<Type>(low - Type::to_float(static_cast<uint16_t>(coarse)),
                       high - Type::to_float(static_cast<uint16_t>(coarse >> 16)));
}

// Of a lane's keys of a stage: [8 keys][2].
struct StageScales {
    float keys[2][2], values[2][2];
};

}  // namespace krasis::cuda
