// hyper_kernel.h: streams that small matrices mix, compiled once per instruction set.
#pragma once

#include "hyper.h"
#include "norm_sum.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

float hyper_inverse_rms(const float *x, int64_t size, float eps) { return inverse_rms(x, size, eps); }

void hyper_sum(const HyperArgs &args, int64_t begin, int64_t end) {
    const int64_t k = args.k, wide = args.streams * k;
    for (int64_t t = begin; t < end; ++t) {
        const float *x = args.x + t * wide, *shares = args.shares + t * args.ld;
        for (int64_t i = 0; i < k; i += 16) {
            V16 sum = V16::zero();
            for (int64_t s = 0; s < args.streams; ++s) sum = fma(V16::set1(shares[s]), V16::load(x + s * k + i), sum);
            sum.store(args.out + t * k + i);
        }
    }
}

void hyper_add(const HyperArgs &args, int64_t begin, int64_t end) {
    const int64_t k = args.k, streams = args.streams;
    V16 before[kMostStreams];
    for (int64_t t = begin; t < end; ++t) {
        const float *post = args.shares + t * args.ld + streams, *comb = post + streams;
        float *x = args.out + t * streams * k;
        for (int64_t i = 0; i < k; i += 16) {
            const V16 added = V16::load(args.added + t * k + i);
            for (int64_t j = 0; j < streams; ++j) before[j] = V16::load(x + j * k + i);
            for (int64_t s = 0; s < streams; ++s) {
                V16 sum = mul(V16::set1(post[s]), added);
                for (int64_t j = 0; j < streams; ++j) sum = fma(V16::set1(comb[j * streams + s]), before[j], sum);
                sum.store(x + s * k + i);
            }
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
