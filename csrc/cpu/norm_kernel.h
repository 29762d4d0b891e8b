// norm_kernel.h: RMSNorm with optional quantisation, compiled once per instruction set.
#pragma once

#include "acts_block.h"
#include "norm.h"
#include "norm_sum.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

KRASIS_INLINE V8 normed(const float *x, const float *weight, V8 inverse) {
    return mul(mul(V8::load(x), inverse), V8::load(weight));
}

void norm_to_acts(const NormArgs &args, int64_t row, float inverse) {
    const krasis_acts &acts = *args.acts;
    const int64_t blocks = args.k / KRASIS_BLOCK_K;
    const V8 inverses = V8::set1(inverse);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t offset = block * KRASIS_BLOCK_K, index = row * blocks + block;
        const float *x = args.x + row * args.k + offset, *weight = args.weight + offset;
        const V8 a = normed(x, weight, inverses), b = normed(x + 8, weight + 8, inverses);
        const V8 c = normed(x + 16, weight + 16, inverses), d = normed(x + 24, weight + 24, inverses);
        quantize_block(a, b, c, d, acts.q + index * KRASIS_BLOCK_K, acts.scale + index, acts.sum + index);
        if (args.out) {
            float *out = args.out + row * args.k + offset;
            a.store(out);
            b.store(out + 8);
            c.store(out + 16);
            d.store(out + 24);
        }
    }
}

void norm_to_floats(const NormArgs &args, int64_t row, float inverse) {
    const float *x = args.x + row * args.k;
    float *out = args.out + row * args.k;
    const V8 inverses = V8::set1(inverse);
    int64_t i = 0;
    for (; i + 8 <= args.k; i += 8) normed(x + i, args.weight + i, inverses).store(out + i);
    for (; i < args.k; ++i) out[i] = x[i] * inverse * args.weight[i];
}

}  // namespace

void rms_norm_rows(const NormArgs &args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float inverse = inverse_rms(args.x + row * args.k, args.k, args.eps);
        if (args.acts) {
            norm_to_acts(args, row, inverse);
        } else {
            norm_to_floats(args, row, inverse);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
