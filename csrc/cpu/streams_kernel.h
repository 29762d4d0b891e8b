// streams_kernel.h: gated residual streams, compiled once per instruction set.
#pragma once

#include <cstring>

#include "activation_math.h"
#include "norm_sum.h"
#include "streams.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

void stream_norm(const StreamArgs &args, int64_t begin, int64_t end) {
    const int64_t k = args.k;
    for (int64_t row = begin * args.streams; row < end * args.streams; ++row) {
        const float *x = args.x + row * k, *weight = args.weight + row % args.streams * k;
        float *out = args.out + row * k;
        const V16 inverse = V16::set1(inverse_rms(x, k, args.factor));
        for (int64_t i = 0; i < k; i += 16) mul(mul(V16::load(x + i), inverse), V16::load(weight + i)).store(out + i);
    }
}

void stream_squash(const StreamArgs &args, int64_t begin, int64_t end) {
    const V16 scale = V16::set1(args.factor);
    alignas(64) float last[16] = {};
    for (int64_t i = begin * args.k; i < end * args.k; i += 16) {
        const int64_t count = end * args.k - i < 16 ? end * args.k - i : 16;
        const size_t bytes = static_cast<size_t>(count) * sizeof(float);
        std::memcpy(last, args.out + i, bytes);
        silu(mul(V16::load(last), scale)).store(last);
        std::memcpy(args.out + i, last, bytes);
    }
}

void stream_mix(const StreamArgs &args, int64_t begin, int64_t end) {
    const int64_t k = args.k, wide = args.streams * k;
    const V16 share = V16::set1(1.0f / static_cast<float>(args.streams));
    for (int64_t t = begin; t < end; ++t) {
        const float *x = args.x + t * wide, *gates = args.gates + t * wide;
        for (int64_t i = 0; i < k; i += 16) {
            V16 sum = V16::zero();
            for (int64_t at = i; at < wide; at += k) sum = fma(sigmoid(V16::load(gates + at)), V16::load(x + at), sum);
            mul(sum, share).store(args.out + t * k + i);
        }
    }
}

void stream_add(const StreamArgs &args, int64_t begin, int64_t end) {
    const int64_t k = args.k;
    alignas(64) float first[16] = {};
    for (int64_t row = begin * args.streams; row < end * args.streams; ++row) {
        first[0] = args.gates[row] / static_cast<float>(args.streams);
        sigmoid(V16::load(first)).store(first);
        const V16 share = V16::set1(2.0f * first[0]);
        first[0] = 0.0f;
        const float *added = args.weight + row / args.streams * k;
        float *out = args.out + row * k;
        for (int64_t i = 0; i < k; i += 16) fma(share, V16::load(added + i), V16::load(out + i)).store(out + i);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
