// acts.h: quantised activations: what may be passed as krasis_acts, and the per-ISA quantiser.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

inline int32_t check_acts(const krasis_acts *acts) {
    if (!acts || acts->tokens < 0 || acts->k <= 0) return KRASIS_ERR_ARGUMENT;
    if (acts->k % KRASIS_BLOCK_K != 0) return KRASIS_ERR_SHAPE;
    if (acts->tokens > 0 && (!acts->q || !acts->scale || !acts->sum)) return KRASIS_ERR_ARGUMENT;
    return KRASIS_OK;
}

// Rows [begin, end) of x (ldx elements apart) into the same rows of out.
namespace avx2 {
void quantize_rows(const float *x, int64_t ldx, const krasis_acts &out, int64_t begin, int64_t end);
}
namespace avx512 {
void quantize_rows(const float *x, int64_t ldx, const krasis_acts &out, int64_t begin, int64_t end);
}

}  // namespace krasis
