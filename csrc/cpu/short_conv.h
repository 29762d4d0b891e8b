// short_conv.h: the part of krasis_short_conv that is compiled per instruction set.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kShortConvChannels = 256;  // that one call does, at most

#define KRASIS_DECLARE_SHORT_CONV(isa)                                                           \
    namespace isa {                                                                              \
    /* Channels from kShortConvChannels * block on, in all rows of a span. */                    \
    void short_conv(const krasis_short_conv_args &args, const krasis_span &span, int64_t block); \
    }
KRASIS_DECLARE_SHORT_CONV(avx2)
KRASIS_DECLARE_SHORT_CONV(avx512)
#undef KRASIS_DECLARE_SHORT_CONV

}  // namespace krasis
