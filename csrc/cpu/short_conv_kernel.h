// short_conv_kernel.h: the gated short convolution, compiled once per instruction set.
#pragma once

#include <algorithm>

#include "conv_ring.h"
#include "short_conv.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

static_assert(kShortConvChannels <= kMaxDeltaDim);

void short_conv(const krasis_short_conv_args &args, const krasis_span &span, int64_t block) {
    const int64_t first = block * kShortConvChannels, width = std::min(kShortConvChannels, args.channels - first);
    auto *columns = reinterpret_cast<float *>(static_cast<uint8_t *>(span.keys) + args.columns_offset_bytes) + first;
    ConvRing ring(columns, args.width, args.channels, width, span.start == 0);
    for (int64_t t = 0; t < span.rows; ++t) {
        const float *b = args.x + (span.first_row + t) * args.ldx + first;
        const float *c = b + args.channels, *x = c + args.channels;
        float *out = args.out + (span.first_row + t) * args.channels + first;
        for (int64_t i = 0; i < width; i += 16) {
            const V16 sum = ring.mix(i, mul(V16::load(b + i), V16::load(x + i)), args.conv + first);
            mul(V16::load(c + i), sum).store(out + i);
        }
        ring.end_row();
    }
    ring.keep(columns);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
