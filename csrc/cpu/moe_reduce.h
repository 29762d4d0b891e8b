// moe_reduce.h: the weighted sum of krasis_moe. Included once by cpu/avx2/moe.cpp and once by cpu/avx512/moe.cpp.
#pragma once

#include "moe.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

void moe_reduce(const MoeColumns &columns, int64_t token, int64_t from, int64_t to) {
    const MoeJob &job = *columns.job;
    const int32_t *position = job.position + token * job.top_k;
    const float *weights = job.weights + token * job.top_k;
    float *out = job.out + token * job.hidden;
    for (int64_t c = from; c < to; c += kStripRows) {
        V16 sum0 = V16::zero(), sum1 = V16::zero();
        for (int64_t j = 0; j < job.top_k; ++j) {
            if (position[j] < 0) continue;
            const float *value = job.partial + position[j] * columns.count() + (c - columns.begin);
            const V16 weight = V16::set1(weights[j]);
            sum0 = fma(weight, V16::load(value), sum0);
            sum1 = fma(weight, V16::load(value + 16), sum1);
        }
        add(V16::load(out + c), sum0).store(out + c);
        add(V16::load(out + c + 16), sum1).store(out + c + 16);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
