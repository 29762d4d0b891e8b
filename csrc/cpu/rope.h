// rope.h: the per-ISA head norm, rotary embedding and cache write.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kMaxHeadDim = 256;

// Tokens [begin, end) of args.
namespace avx2 {
void rope_store_tokens(const krasis_qkv_args &args, int64_t begin, int64_t end);
}
namespace avx512 {
void rope_store_tokens(const krasis_qkv_args &args, int64_t begin, int64_t end);
}

}  // namespace krasis
