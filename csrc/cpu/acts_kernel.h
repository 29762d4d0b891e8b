// acts_kernel.h: the row quantiser, compiled once per instruction set.
#pragma once

#include "acts.h"
#include "acts_block.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

void quantize_rows(const float *x, int64_t ldx, const krasis_acts &out, int64_t begin, int64_t end) {
    const int64_t blocks = out.k / KRASIS_BLOCK_K;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t index = row * blocks + block;
            quantize_block(x + row * ldx + block * KRASIS_BLOCK_K, out.q + index * KRASIS_BLOCK_K, out.scale + index,
                           out.sum + index);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
