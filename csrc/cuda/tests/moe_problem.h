// moe_problem.h: one grouped product: ragged experts with packed weights, routed slots, and the right answer in
// float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "array.h"
#include "marlin_reference.h"

namespace test {

inline constexpr int64_t kCounts[] = {0, 1, 15, 16, 17, 63, 64, 65, 300};
inline constexpr int32_t kNumExperts = 9;

struct MoeCase {
    int64_t k = 256, n = 192, group = 128;
    int32_t dtype = KRASIS_BF16, scale_dtype = KRASIS_BF16, out_dtype = KRASIS_F32, m_block = 64;
    bool gated = false;
    int64_t top_k = 2;
    bool wild_scales = false, biased = false;
    int32_t activation = KRASIS_CUDA_SILU;
    double count_factor = 1;  // of kCounts
    uint64_t seed = 1;
};

// Slots, experts and their packed weights for one case; knows the right answer.
class MoeProblem {
  public:
    explicit MoeProblem(const MoeCase &c)
        : case_(c), random_(c.seed), codes_offset_(256), scales_offset_(512 + c.k * c.n / 2), table_(kNumExperts) {
        make_ids();
        make_experts();
        biases_ = std::make_unique<Array<float>>(static_cast<size_t>(kNumExperts * c.n));
        for (size_t i = 0; i < biases_->size(); ++i) (*biases_)[i] = random_.normal();
        const int64_t rows = num_slots() / c.top_k;
        activations_ = std::make_unique<Array<uint16_t>>(static_cast<size_t>(rows * stride()));
        activations_->poison();
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < c.k; ++i) activation(r, i) = to_16(random_.normal(), c.dtype);
        }
        align();
        out_ = std::make_unique<Array<uint8_t>>(static_cast<size_t>(num_slots() * out_stride() * out_bytes()));
        executed_ = std::make_unique<Array<int64_t>>(1);
    }

    int64_t num_slots() const { return static_cast<int64_t>(ids_->size()); }
    int64_t stride() const { return case_.k + 8; }
    int64_t out_columns() const { return case_.gated ? case_.n / 2 : case_.n; }
    int64_t out_stride() const { return out_columns() + 8; }
    int64_t out_bytes() const { return case_.out_dtype == KRASIS_F32 ? 4 : 2; }
    Array<uint8_t> &out() { return *out_; }
    Array<int32_t> &ids() { return *ids_; }
    void forget(int expert) { table_[static_cast<size_t>(expert)] = nullptr; }
    void move_record(int expert, Region &region, int64_t base, int64_t codes, int64_t scales) {
        const auto index = static_cast<size_t>(expert);
        const uint8_t *record = records_[index]->data();
        region.put(base + codes, record + codes_offset_, MarlinWeight::codes_bytes(case_.k, case_.n));
        region.put(base + scales, record + scales_offset_, MarlinWeight::scales_bytes(case_.k, case_.n, case_.group));
        table_[index] = region.at(base);
    }
    bool is_computed(int64_t slot, int begin, int end) const {
        const int id = (*ids_)[static_cast<size_t>(slot)];
        return id >= begin && id < end && table_[static_cast<size_t>(id)];
    }

    krasis_cuda_moe_gemm_args args() {
        krasis_cuda_moe_gemm_args a{};
        a.activations = activations_->upload();
        a.activation_stride = stride();
        a.slots_per_row = case_.top_k;
        a.dtype = case_.dtype;
        a.gated = case_.gated;
        a.expert_base = table_.upload();
        a.codes_offset = codes_offset_;
        a.scales_offset = scales_offset_;
        a.scale_dtype = case_.scale_dtype;
        a.m_block = case_.m_block;
        a.group = case_.group;
        a.k = case_.k;
        a.n = case_.n;
        a.num_slots = num_slots();
        a.num_experts = kNumExperts;
        a.expert_end = kNumExperts;
        a.sorted_slots = sorted_->device();
        a.block_experts = blocks_->device();
        a.first_block = first_->device();
        a.out = out_->device();
        a.out_stride = out_stride();
        a.out_dtype = case_.out_dtype;
        a.num_executed = executed_->device();
        a.activation = case_.activation;
        a.limit = kLimit;
        a.alpha = kAlpha;
        if (!case_.biased) return a;
        a.bias = biases_->upload();
        if (case_.gated) a.up_bias = a.bias + kNumExperts * out_columns();
        return a;
    }

    int32_t run(const krasis_cuda_moe_gemm_args &a) {
        const int32_t status = krasis_cuda_moe_gemm(&a, nullptr);
        out_->download();
        executed_->download();
        return status;
    }

    void reset() {
        out_->poison();
        out_->upload();
        (*executed_)[0] = 0;
        executed_->upload();
    }

    void check(int begin, int end) const {
        int64_t computed = 0;
        for (int64_t slot = 0; slot < num_slots(); ++slot) {
            const bool expected = is_computed(slot, begin, end);
            computed += expected;
            check_row(slot, expected);
        }
        CHECK((*executed_)[0] == computed);
    }

  private:
    static constexpr float kLimit = 3.0f, kAlpha = 1.702f;

    double bias(int64_t slot, int64_t column) const {
        if (!case_.biased) return 0;
        const int64_t expert = (*ids_)[static_cast<size_t>(slot)], columns = out_columns();
        const int64_t first = case_.gated && column >= columns ? kNumExperts * columns : 0;
        return (*biases_)[static_cast<size_t>(first + expert * columns + column % columns)];
    }

    static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

    double activate(double g, double u) const {
        const double low = std::min<double>(g, kLimit), cut = std::clamp<double>(u, -kLimit, kLimit);
        switch (case_.activation) {
            case KRASIS_CUDA_GELU_TANH:
                return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
            case KRASIS_CUDA_SWIGLU_OFFSET:
                return low * sigmoid(static_cast<double>(kAlpha) * low) * (cut + 1);
            case KRASIS_CUDA_SILU_CLAMPED_BEFORE:
                return low * sigmoid(low) * cut;
            case KRASIS_CUDA_SILU_CLAMPED_AFTER:
                return std::min<double>(g * sigmoid(g), kLimit) * cut;
            default:
                return g * sigmoid(g) * u;
        }
    }

    uint16_t &activation(int64_t row, int64_t i) { return (*activations_)[static_cast<size_t>(row * stride() + i)]; }
    double activation_value(int64_t row, int64_t i) const {
        return to_double((*activations_)[static_cast<size_t>(row * stride() + i)], case_.dtype);
    }

    void make_ids() {
        std::vector<int32_t> ids;
        for (int e = 0; e < kNumExperts; ++e) {
            ids.insert(ids.end(), static_cast<size_t>(kCounts[e] * case_.count_factor), e);
        }
        ids.insert(ids.end(), 20, -1);
        while (ids.size() % static_cast<size_t>(case_.top_k)) ids.push_back(-1);
        for (size_t i = ids.size(); i > 1; --i)
            std::swap(ids[i - 1], ids[static_cast<size_t>(random_.below(static_cast<int64_t>(i)))]);
        ids_ = std::make_unique<Array<int32_t>>(ids.size());
        std::copy(ids.begin(), ids.end(), ids_->data());
    }

    void make_experts() {
        const int64_t bytes = scales_offset_ + MarlinWeight::scales_bytes(case_.k, case_.n, case_.group);
        for (int e = 0; e < kNumExperts; ++e) {
            MarlinWeight weight(random_, case_.k, case_.n, case_.group, case_.scale_dtype);
            if (case_.wild_scales) weight.make_wild(random_);
            records_.push_back(std::make_unique<Array<uint8_t>>(static_cast<size_t>(bytes)));
            uint8_t *record = records_.back()->data();
            weight.pack_codes(reinterpret_cast<uint32_t *>(record + codes_offset_));
            weight.pack_scales(record + scales_offset_);
            values_.push_back(weight.values());
            table_[static_cast<size_t>(e)] = records_.back()->upload();
        }
    }

    void align() {
        const auto blocks = static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots(), kNumExperts, case_.m_block));
        sorted_ = std::make_unique<Array<int32_t>>(blocks * static_cast<size_t>(case_.m_block), -7);
        blocks_ = std::make_unique<Array<int32_t>>(blocks, -7);
        first_ = std::make_unique<Array<int32_t>>(kNumExperts + 1, -7);
        counts_ = std::make_unique<Array<int32_t>>(kNumExperts, -7);
        invalid_ = std::make_unique<Array<int32_t>>(1, -7);
        const krasis_cuda_align_args a{ids_->upload(),   num_slots(),       kNumExperts,
                                       case_.m_block,    sorted_->upload(), blocks_->upload(),
                                       first_->upload(), counts_->upload(), invalid_->upload()};
        CHECK_OK(krasis_cuda_moe_align(&a, nullptr));
    }

    // Sum in float64, and the sum of magnitudes that bounds what fp32 accumulation may lose.
    void exact(int64_t slot, std::vector<double> &sums, std::vector<double> &sizes) const {
        const auto &values = values_[static_cast<size_t>((*ids_)[static_cast<size_t>(slot)])];
        sums.assign(static_cast<size_t>(case_.n), 0);
        sizes.assign(static_cast<size_t>(case_.n), 0);
        for (int64_t i = 0; i < case_.k; ++i) {
            const double x = activation_value(slot / case_.top_k, i);
            const double *row = values.data() + i * case_.n;
            for (size_t j = 0; j < sums.size(); ++j) sums[j] += x * row[j], sizes[j] += std::fabs(x * row[j]);
        }
    }

    double out_value(int64_t slot, int64_t column) const {
        const uint8_t *at = out_->data() + (slot * out_stride() + column) * out_bytes();
        if (case_.out_dtype == KRASIS_F32) {
            float value;
            std::memcpy(&value, at, 4);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        return to_double(bits, case_.dtype);
    }

    void check_row(int64_t slot, bool expected) const {
        const uint8_t *row = out_->data() + slot * out_stride() * out_bytes();
        const int64_t untouched_from = expected ? out_columns() * out_bytes() : 0;
        for (int64_t i = untouched_from; i < out_stride() * out_bytes(); ++i) CHECK(row[i] == 0xff);
        if (!expected) return;
        std::vector<double> sums, sizes;
        exact(slot, sums, sizes);
        constexpr double kSumError = 2e-6;
        const double rounding = case_.out_dtype == KRASIS_F32 ? 1e-6
                                : case_.dtype == KRASIS_BF16  ? 0x1.02p-8
                                                              : 0x1.02p-11;
        for (int64_t c = 0; c < out_columns(); ++c) {
            const auto i = static_cast<size_t>(c);
            double value = sums[i] + bias(slot, c), error = kSumError * (sizes[i] + std::fabs(value));
            if (case_.gated) {
                const size_t u = i + static_cast<size_t>(out_columns());
                const double gate = value, up = sums[u] + bias(slot, c + out_columns());
                const double up_error = kSumError * (sizes[u] + std::fabs(up));
                value = activate(gate, up);
                // No activation is steeper than 1.7 in the gate.
                error = 1.7 * error * (1 + std::fabs(up)) + std::fabs(gate) * up_error + 2e-6 * std::fabs(value);
            } else if (case_.activation == KRASIS_CUDA_RELU_SQUARED) {
                error *= 2 * std::fabs(value) + error;
                value = value > 0 ? value * value : 0;
            }
            // Halves below 2^-14 have absolute steps of 2^-24.
            CHECK(std::fabs(out_value(slot, c) - value) <= error + rounding * std::fabs(value) + 0x1p-24);
        }
    }

    MoeCase case_;
    Random random_;
    int64_t codes_offset_, scales_offset_;
    std::unique_ptr<Array<int32_t>> ids_, sorted_, blocks_, first_, counts_, invalid_;
    std::vector<std::unique_ptr<Array<uint8_t>>> records_;
    std::vector<std::vector<double>> values_;
    Array<const void *> table_;
    std::unique_ptr<Array<uint16_t>> activations_;
    std::unique_ptr<Array<float>> biases_;
    std::unique_ptr<Array<uint8_t>> out_;
    std::unique_ptr<Array<int64_t>> executed_;
};

}  // namespace test
