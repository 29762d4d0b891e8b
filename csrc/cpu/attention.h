// attention.h: how causal grouped-query attention is cut into tasks, and its per-ISA parts.
//
// A row is one (token, query head) pair. The rows of a task share a key/value head, so that each key and value is read
// once for all of them. Along the keys everything is cut at absolute positions: blocks of kBlockKeys for the online
// softmax, splits of kSplitKeys whose partial results are merged in order. A row's arithmetic therefore depends on its
// position alone, and not on the other rows, the threads or the vector width.
#pragma once

#include <cstdint>

#include "../krasis.h"
#include "rope.h"

namespace krasis {

constexpr int64_t kBlockKeys = 64;
constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMaxRows = 64;
// With at most this many tokens (decode) the splits of a task run in parallel and leave partial results in the
// workspace.
constexpr int64_t kSplitTokens = 4;
constexpr int64_t kPartialTail = 16;  // floats after the head_dim values of a partial: maximum, sum, padding

// Rows of one task: tokens [first_token, +num_tokens) x query heads [first_head, +num_heads), row = token-major.
struct AttentionTask {
    int64_t kv_head, first_head, num_heads, first_token, num_tokens;
};

inline int64_t num_splits(int64_t num_keys) { return (num_keys + kSplitKeys - 1) / kSplitKeys; }

// partials: [T * num_heads, num_splits(start + T), head_dim + kPartialTail].
namespace avx2 {
void attend_task(const krasis_attention_args &args, const AttentionTask &task);
void attend_split(const krasis_attention_args &args, const AttentionTask &task, int64_t split, float *partials);
void merge_splits(const krasis_attention_args &args, int64_t row, const float *partials);
}  // namespace avx2
namespace avx512 {
void attend_task(const krasis_attention_args &args, const AttentionTask &task);
void attend_split(const krasis_attention_args &args, const AttentionTask &task, int64_t split, float *partials);
void merge_splits(const krasis_attention_args &args, int64_t row, const float *partials);
}  // namespace avx512

}  // namespace krasis
