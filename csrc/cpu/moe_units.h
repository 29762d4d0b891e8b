// moe_units.h: the products of krasis_moe. Included once by the moe.cpp of cpu/avx2, cpu/avx512 and cpu/amx.
#pragma once

#include <cstring>

#include "activation_math.h"
#include "acts_block.h"
#include "gemm_strip.h"
#include "moe.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

constexpr int64_t kMoePanels = 8;  // panels that go through a strip together

// Tokens in panels [begin, end).
KRASIS_INLINE int64_t tokens_between(const PanelCut &cut, int64_t begin, int64_t end) {
    return (end < cut.count ? cut.first(end) : cut.tokens) - cut.first(begin);
}

// 32 intermediate elements of a token, quantised.
KRASIS_INLINE void write_block(const MoeJob &job, V16 first, V16 second, uint8_t *q, uint8_t *scale, uint8_t *offset) {
    float step;
    int32_t sum;
    quantize_block(low(first), high(first), low(second), high(second), reinterpret_cast<int8_t *>(q), &step, &sum);
    sum *= -job.offset_factor;
    std::memcpy(scale, &step, sizeof step);
    std::memcpy(offset, &sum, sizeof sum);
}

// even/odd: [tokens][16 gate, 16 up] of two neighbouring strips -> 32 intermediate elements of a token.
template <int32_t kKind>
KRASIS_INLINE void write_middle(const MoeJob &job, const float *even, const float *odd, uint8_t *q, uint8_t *scale,
                                uint8_t *offset) {
    const V16 first = activate<kKind>(V16::load(even), V16::load(even + 16), job.limit, job.alpha);
    const V16 second = activate<kKind>(V16::load(odd), V16::load(odd + 16), job.limit, job.alpha);
    write_block(job, first, second, q, scale, offset);
}

// values: [tokens][32] += first [16], second [16]; null: nothing is added.
KRASIS_INLINE void add_biases(float *values, int64_t tokens, const float *first, const float *second) {
    const V16 low_rows = first ? V16::load(first) : V16::zero(), high_rows = second ? V16::load(second) : V16::zero();
    for (int64_t t = 0; t < tokens; ++t, values += kStripRows) {
        add(V16::load(values), low_rows).store(values);
        add(V16::load(values + 16), high_rows).store(values + 16);
    }
}

// Gate's and up's biases to what write_middle takes.
KRASIS_INLINE void add_gate_up_biases(const MoeJob &job, int64_t expert, int64_t block, int64_t tokens, float *even,
                                      float *odd) {
    if (!job.gate_bias && !job.up_bias) return;
    const int64_t column = expert * job.intermediate + block * kBlock;
    const float *gate = job.gate_bias ? job.gate_bias + column : nullptr;
    const float *up = job.up_bias ? job.up_bias + column : nullptr;
    add_biases(even, tokens, gate, up);
    add_biases(odd, tokens, gate ? gate + 16 : nullptr, up ? up + 16 : nullptr);
}

// As moe_gate_up, of experts without a gate: relu(up)^2.
KRASIS_INLINE void up_alone(const MoeJob &job, const MoeGroup &group, int64_t block) {
    const PanelCut cut = job.cut(group, job.hidden), middle_cut = job.cut(group, job.intermediate);
    const uint8_t *strip =
        job.blob + group.expert * job.expert_stride_bytes + block * cut.blocks * strip_block_bytes(job.format);
    const float *bias = job.up_bias ? job.up_bias + group.expert * job.intermediate + block * kBlock : nullptr;
    alignas(64) float up[kMoePanels * kPanelTokens * kStripRows];
    for (int64_t begin = 0; begin < cut.count; begin += kMoePanels) {
        const int64_t end = std::min(begin + kMoePanels, cut.count);
        multiply_strip(job.format, strip, job.input_of(group), cut, begin, end, up);
        if (bias) add_biases(up, tokens_between(cut, begin, end), bias, bias + 16);
        const float *from = up;
        for (int64_t p = begin; p < end; ++p) {
            const int64_t width = cut.width(p);
            uint8_t *to = job.middle_of(group) + middle_cut.offset_bytes(p) + block * width * kPanelTokenBytes;
            for (int64_t t = 0; t < width; ++t, from += kStripRows) {
                const V16 first = max(V16::zero(), V16::load(from)), second = max(V16::zero(), V16::load(from + 16));
                write_block(job, mul(first, first), mul(second, second), to + t * kBlock, to + width * kBlock + t * 4,
                            to + width * (kBlock + 4) + t * 4);
            }
        }
    }
}

void moe_gate_up(const MoeJob &job, int64_t group_index, int64_t block) {
    const MoeGroup &group = job.groups[group_index];
    if (job.matrices == 1) return up_alone(job, group, block);
    const PanelCut cut = job.cut(group, job.hidden);
    const PanelCut middle_cut = job.cut(group, job.intermediate);
    const int64_t strip_bytes = cut.blocks * strip_block_bytes(job.format);
    const uint8_t *strips = job.blob + group.expert * job.expert_stride_bytes + 2 * block * strip_bytes;
    alignas(64) float even[kMoePanels * kPanelTokens * kStripRows], odd[kMoePanels * kPanelTokens * kStripRows];
    for (int64_t begin = 0; begin < cut.count; begin += kMoePanels) {
        const int64_t end = std::min(begin + kMoePanels, cut.count);
        multiply_strip(job.format, strips, job.input_of(group), cut, begin, end, even);
        multiply_strip(job.format, strips + strip_bytes, job.input_of(group), cut, begin, end, odd);
        add_gate_up_biases(job, group.expert, block, tokens_between(cut, begin, end), even, odd);
        const float *from_even = even, *from_odd = odd;
        for (int64_t p = begin; p < end; ++p) {
            const int64_t width = cut.width(p);
            uint8_t *to = job.middle_of(group) + middle_cut.offset_bytes(p) + block * width * kPanelTokenBytes;
            with_activation(job.activation, [&](auto kind) {
                for (int64_t t = 0; t < width; ++t, from_even += kStripRows, from_odd += kStripRows) {
                    write_middle<decltype(kind)::value>(job, from_even, from_odd, to + t * kBlock,
                                                        to + width * kBlock + t * 4, to + width * (kBlock + 4) + t * 4);
                }
            });
        }
    }
}

void moe_down(const MoeColumns &columns, int64_t group_index, int64_t strip) {
    const MoeJob &job = *columns.job;
    const MoeGroup &group = job.groups[group_index];
    const PanelCut cut = job.cut(group, job.intermediate);
    const int64_t strip_bytes = cut.blocks * strip_block_bytes(job.format);
    const uint8_t *weight = job.blob + group.expert * job.expert_stride_bytes + job.w2_offset_bytes +
                            (columns.begin / kStripRows + strip) * strip_bytes;
    alignas(64) float acc[kMoePanels * kPanelTokens * kStripRows];
    float *to = job.partial + group.first * columns.count() + strip * kStripRows;
    for (int64_t begin = 0; begin < cut.count; begin += kMoePanels) {
        const int64_t end = std::min(begin + kMoePanels, cut.count);
        multiply_strip(job.format, weight, job.middle_of(group), cut, begin, end, acc);
        const int64_t tokens = tokens_between(cut, begin, end);
        if (job.down_bias) {
            const float *bias = job.down_bias + group.expert * job.hidden + columns.begin + strip * kStripRows;
            add_biases(acc, tokens, bias, bias + 16);
        }
        for (int64_t t = 0; t < tokens; ++t, to += columns.count()) {
            V16::load(acc + t * kStripRows).store(to);
            V16::load(acc + t * kStripRows + 16).store(to + 16);
        }
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
