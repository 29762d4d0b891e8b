// spans.h: what may be passed as the spans of a call, and where a layer's keys and values lie in a slot.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

inline int64_t kv_bytes(int32_t kv_dtype) { return kv_dtype == KRASIS_F16 ? 2 : 4; }

// For krasis_qkv_args and krasis_attention_args. max_positions: of what else is looked up by position.
template <class Args>
int32_t check_spans(const Args &args, int64_t max_positions) {
    if (args.kv_dtype != KRASIS_F32 && args.kv_dtype != KRASIS_F16) return KRASIS_ERR_ARGUMENT;
    if (args.num_spans < 0 || args.keys_offset_bytes < 0 || args.values_offset_bytes < 0) return KRASIS_ERR_ARGUMENT;
    const int64_t bytes = kv_bytes(args.kv_dtype);
    if (args.keys_offset_bytes % bytes != 0 || args.values_offset_bytes % bytes != 0) return KRASIS_ERR_SHAPE;
    if (args.num_spans > 0 && !args.spans) return KRASIS_ERR_ARGUMENT;
    int64_t row = 0;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        const krasis_span &span = args.spans[i];
        if (span.rows == 0) continue;
        if (span.rows < 0 || span.start < 0 || span.first_row != row || !span.keys || !span.values) {
            return KRASIS_ERR_ARGUMENT;
        }
        if (span.rows > args.tokens - row) return KRASIS_ERR_RANGE;
        if (span.rows > args.capacity || span.start > args.capacity - span.rows) return KRASIS_ERR_RANGE;
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
