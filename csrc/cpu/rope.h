// rope.h: the per-ISA bias, norm, rotary embedding and cache write.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kMaxHeadDim = 512;

// Elements of a row of qkv.
inline int64_t qkv_size(const krasis_qkv_args &args) {
    return (args.num_heads + (args.shared_kv ? 1 : 2) * args.num_kv_heads) * args.head_dim;
}

// Rows [begin, end) of args, all of one span.
namespace avx2 {
void rope_store_rows(const krasis_qkv_args &args, const krasis_span &span, int64_t begin, int64_t end);
}
namespace avx512 {
void rope_store_rows(const krasis_qkv_args &args, const krasis_span &span, int64_t begin, int64_t end);
}

}  // namespace krasis
