// latent.h: the per-ISA norm, rotation, cache write and quantisation of latent attention.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

// Rows [begin, end) of args, all of one span.
namespace avx2 {
void latent_rows(const krasis_latent_args &args, const krasis_span &span, int64_t begin, int64_t end);
}
namespace avx512 {
void latent_rows(const krasis_latent_args &args, const krasis_span &span, int64_t begin, int64_t end);
}

}  // namespace krasis
