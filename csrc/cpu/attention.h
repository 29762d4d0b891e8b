// attention.h: how causal grouped-query attention is cut into tasks, and its per-ISA parts.
//
// A row is one (token, query head) pair. The rows of a task share a key/value head, so that each key and value is read
// once for all of them. Along the keys everything is cut at absolute positions: blocks of kBlockKeys for the online
// softmax, splits of kSplitKeys whose partial results are merged in order. A row's arithmetic therefore depends on its
// position alone, and not on the other rows, the threads or the vector width. Blocks and splits of which a row sees no
// key (they lie behind its window) are left out, for that row, in every call alike.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kBlockKeys = 64;
constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMaxRows = 64, kMaxWideRows = 32;  // of a task; wide: of heads of more than kNarrowDim channels
constexpr int64_t kNarrowDim = 256, kMaxAttentionDim = 576;
// A span of at most this many tokens (decode) has its splits computed in parallel, with partial results in the
// workspace.
constexpr int64_t kSplitTokens = 4;
constexpr int64_t kPartialTail = 16;  // floats after the values of a partial: maximum, sum, padding

// Rows of one task: tokens [first_token, +num_tokens) of a span x query heads [first_head, +num_heads), token-major.
struct AttentionTask {
    int64_t kv_head, first_head, num_heads, first_token, num_tokens;
};

// Channels of a value, and so of a head's output.
inline int64_t value_width(const krasis_attention_args &args) {
    return args.value_dim > 0 ? args.value_dim : args.head_dim;
}
inline bool is_wide(const krasis_attention_args &args) { return args.head_dim > kNarrowDim; }

inline int64_t num_splits(int64_t num_keys) { return (num_keys + kSplitKeys - 1) / kSplitKeys; }

// The first key that a query sees.
inline int64_t first_key(int64_t window, int64_t position) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}

// One span of a call. partials: [tokens * num_heads, splits, value width + kPartialTail], splits counted from
// first_split.
struct AttentionSpan {
    const krasis_attention_args *args;
    const float *q;
    float *out;
    const void *keys, *values;
    int64_t start, tokens, first_split, splits;
    float *partials;
};

#define KRASIS_DECLARE_ATTENTION(isa)                                                       \
    namespace isa {                                                                         \
    void attend_task(const AttentionSpan &span, const AttentionTask &task);                 \
    /* split: counted from key 0. */                                                        \
    void attend_split(const AttentionSpan &span, const AttentionTask &task, int64_t split); \
    /* row: token of the span * num_heads + head. */                                        \
    void merge_splits(const AttentionSpan &span, int64_t row);                              \
    }
KRASIS_DECLARE_ATTENTION(avx2)
KRASIS_DECLARE_ATTENTION(avx512)
#undef KRASIS_DECLARE_ATTENTION

}  // namespace krasis
