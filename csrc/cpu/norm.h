// norm.h: the per-ISA RMSNorm over rows.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

struct NormArgs {
    const float *x; /* [T, k] */
    int64_t k;
    const float *weight; /* [k] */
    float eps;
    float *out;              /* [T, k] or null */
    const krasis_acts *acts; /* [T, k] or null */
};

namespace avx2 {
void rms_norm_rows(const NormArgs &args, int64_t begin, int64_t end);
}
namespace avx512 {
void rms_norm_rows(const NormArgs &args, int64_t begin, int64_t end);
}

}  // namespace krasis
