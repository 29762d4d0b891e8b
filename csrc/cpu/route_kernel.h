// route_kernel.h: softmax of one row, compiled once per instruction set.
#pragma once

#include "route.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

void softmax_row(const float *logits, int64_t num_experts, float *probabilities) {
    const int64_t padded = (num_experts + 15) / 16 * 16;
    for (int64_t i = 0; i < num_experts; ++i) probabilities[i] = logits[i];
    for (int64_t i = num_experts; i < padded; ++i) probabilities[i] = -__builtin_inff();
    V16 largest = V16::load(probabilities);
    for (int64_t i = 16; i < padded; i += 16) largest = max(largest, V16::load(probabilities + i));
    const V16 shift = V16::set1(hmax(largest));
    V16 sums = V16::zero();
    for (int64_t i = 0; i < padded; i += 16) {
        const V16 e = exp(sub(V16::load(probabilities + i), shift));
        sums = add(sums, e);
        e.store(probabilities + i);
    }
    const V16 total = V16::set1(hsum(sums));
    for (int64_t i = 0; i < padded; i += 16) div(V16::load(probabilities + i), total).store(probabilities + i);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
