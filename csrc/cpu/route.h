// route.h: the per-ISA softmax of router logits.
#pragma once

#include <cstdint>

namespace krasis {

constexpr int64_t kMaxExperts = 4096;  // bounds the scratch on the stack

// probabilities[0, num_experts) = softmax(logits); the array has room for num_experts rounded up to 16.
namespace avx2 {
void softmax_row(const float *logits, int64_t num_experts, float *probabilities);
}
namespace avx512 {
void softmax_row(const float *logits, int64_t num_experts, float *probabilities);
}

}  // namespace krasis
