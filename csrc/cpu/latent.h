// latent.h: the per-ISA norm, rotation, cache write and quantisation of latent attention.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kMaxLatentBytes = 576;  // channels of a row of 8-bit codes: as many as attention reads

// Rows [begin, end) of args, all of one span.
namespace avx2 {
void latent_rows(const krasis_latent_args &args, const krasis_span &span, int64_t begin, int64_t end);
}
namespace avx512 {
void latent_rows(const krasis_latent_args &args, const krasis_span &span, int64_t begin, int64_t end);
}

}  // namespace krasis
