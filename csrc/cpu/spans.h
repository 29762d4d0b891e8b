// spans.h: what may be passed as the spans of a call, and where a layer's keys and values lie in a slot.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kScaleBytes = 4;  // of a part of a row of 8-bit codes

inline int64_t kv_row_bytes(int32_t kv_dtype, int64_t channels, int64_t parts) {
    if (kv_dtype == KRASIS_I8) return channels + parts * kScaleBytes;
    return channels * (kv_dtype == KRASIS_F16 ? 2 : 4);
}

// Bytes from one position's key to the next, and of values.
inline int64_t row_bytes(const krasis_qkv_args &args) { return kv_row_bytes(args.kv_dtype, args.head_dim, 1); }
inline int64_t row_bytes(const krasis_attention_args &args) {
    return kv_row_bytes(args.kv_dtype, args.head_dim, args.value_dim > 0 ? 2 : 1);
}
inline int64_t row_bytes(const krasis_latent_args &args) {
    return kv_row_bytes(args.kv_dtype, args.kv_rank + args.rope_dim, 2);
}
// Of an index's keys, which are kept as values; with gates where pools are scored.
template <class Args>
int64_t index_row_bytes(const Args &args) {
    const int64_t parts = args.block > 1 ? 2 : 1;
    return kv_row_bytes(args.kv_dtype, parts * args.dim, parts);
}
inline int64_t row_bytes(const krasis_index_args &args) { return index_row_bytes(args); }
inline int64_t row_bytes(const krasis_choose_args &args) { return index_row_bytes(args); }

// Keys that a row attends to which sees so many: all, or the best pools of block tokens and what is behind the last.
inline int64_t chosen_keys(int64_t seen, int64_t budget, int64_t block) {
    return seen / block > budget / block ? budget + seen % block : seen;
}

constexpr int64_t kMostRingPosition = int64_t{1} << 40;  // keeps sums of positions far from overflow

inline bool is_ring(const krasis_qkv_args &args) { return args.ring != 0; }
inline bool is_ring(const krasis_attention_args &args) { return args.ring != 0; }
inline bool is_ring(const krasis_latent_args &) { return false; }
inline bool is_ring(const krasis_index_args &) { return false; }
inline bool is_ring(const krasis_choose_args &) { return false; }

// Where a position lies among a head's rows.
template <class Args>
int64_t row_of(const Args &args, int64_t position) {
    return is_ring(args) ? position % args.capacity : position;
}

// For krasis_qkv_args and krasis_attention_args. max_positions: of what else is looked up by position.
template <class Args>
int32_t check_spans(const Args &args, int64_t max_positions) {
    if (args.kv_dtype != KRASIS_F32 && args.kv_dtype != KRASIS_F16 && args.kv_dtype != KRASIS_I8) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.num_spans < 0 || args.keys_offset_bytes < 0 || args.values_offset_bytes < 0) return KRASIS_ERR_ARGUMENT;
    const int64_t bytes = args.kv_dtype == KRASIS_F16 ? 2 : 4;
    if (args.keys_offset_bytes % bytes != 0 || args.values_offset_bytes % bytes != 0) return KRASIS_ERR_SHAPE;
    if (args.num_spans > 0 && !args.spans) return KRASIS_ERR_ARGUMENT;
    if (is_ring(args) && (args.capacity <= 0 || args.capacity % KRASIS_RING_STEP != 0)) return KRASIS_ERR_SHAPE;
    const int64_t most_positions = is_ring(args) ? kMostRingPosition : args.capacity;
    int64_t row = 0;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        const krasis_span &span = args.spans[i];
        if (span.rows == 0) continue;
        if (span.rows < 0 || span.start < 0 || span.first_row != row || !span.keys || !span.values) {
            return KRASIS_ERR_ARGUMENT;
        }
        if (span.rows > args.tokens - row) return KRASIS_ERR_RANGE;
        if (span.rows > args.capacity || span.start > most_positions - span.rows) return KRASIS_ERR_RANGE;
        if (span.rows > max_positions || span.start > max_positions - span.rows) return KRASIS_ERR_RANGE;
        row += span.rows;
    }
    return row == args.tokens ? KRASIS_OK : KRASIS_ERR_RANGE;
}

template <class Args>
void *layer_keys(const Args &args, const krasis_span &span) {
    return static_cast<uint8_t *>(span.keys) + args.keys_offset_bytes;
}

template <class Args>
void *layer_values(const Args &args, const krasis_span &span) {
    return static_cast<uint8_t *>(span.values) + args.values_offset_bytes;
}

}  // namespace krasis
