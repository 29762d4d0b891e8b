// test_moe_gemm.cpp: the grouped product against float64 on every layout, ragged row counts and both 16-bit types.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>

#include "array.h"
#include "marlin_reference.h"
#include "suites.h"

namespace test {
namespace {

constexpr int64_t kCounts[] = {0, 1, 15, 16, 17, 63, 64, 65, 300};
constexpr int32_t kNumExperts = 9;

struct Case {
    int64_t k = 256, n = 192, group = 128;
    int32_t dtype = KRASIS_BF16, scale_dtype = KRASIS_BF16, out_dtype = KRASIS_F32, m_block = 64;
    bool gated = false;
    int64_t top_k = 2;
    double count_factor = 1;  // of kCounts
    uint64_t seed = 1;
};

// Slots, experts and their packed weights for one case; knows the right answer.
class Problem {
  public:
    explicit Problem(const Case &c)
        : case_(c), random_(c.seed), codes_offset_(256), scales_offset_(512 + c.k * c.n / 2), table_(kNumExperts) {
        make_ids();
        make_experts();
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
            const MarlinWeight weight(random_, case_.k, case_.n, case_.group, case_.scale_dtype);
            records_.push_back(std::make_unique<Array<uint8_t>>(static_cast<size_t>(bytes)));
            uint8_t *record = records_.back()->data();
            weight.pack_codes(reinterpret_cast<uint32_t *>(record + codes_offset_));
            weight.pack_scales(reinterpret_cast<uint16_t *>(record + scales_offset_));
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
            double value = sums[i], error = kSumError * sizes[i];
            if (case_.gated) {
                const size_t u = i + static_cast<size_t>(out_columns());
                const double silu = sums[i] / (1 + std::exp(-sums[i]));
                value = silu * sums[u];
                error =
                    1.1 * error * std::fabs(sums[u]) + std::fabs(silu) * kSumError * sizes[u] + 2e-6 * std::fabs(value);
            }
            // Halves below 2^-14 have absolute steps of 2^-24.
            CHECK(std::fabs(out_value(slot, c) - value) <= error + rounding * std::fabs(value) + 0x1p-24);
        }
    }

    Case case_;
    Random random_;
    int64_t codes_offset_, scales_offset_;
    std::unique_ptr<Array<int32_t>> ids_, sorted_, blocks_, first_, counts_, invalid_;
    std::vector<std::unique_ptr<Array<uint8_t>>> records_;
    std::vector<std::vector<double>> values_;
    Array<const void *> table_;
    std::unique_ptr<Array<uint16_t>> activations_;
    std::unique_ptr<Array<uint8_t>> out_;
    std::unique_ptr<Array<int64_t>> executed_;
};

void check_case(const Case &c) {
    Problem problem(c);
    problem.reset();
    CHECK_OK(problem.run(problem.args()));
    const int before = failures;
    problem.check(0, kNumExperts);
    if (failures != before) {
        std::printf("  in k %d, n %d, group %d, dtype %d, scales %d, out %d, m_block %d, gated %d\n", int(c.k),
                    int(c.n), int(c.group), c.dtype, c.scale_dtype, c.out_dtype, c.m_block, c.gated);
    }
}

// Every layout, block size and type; the widths leave part of the last block of columns unused.
void check_layouts() {
    int i = 0;
    for (int64_t group : {32, 64, 128, 256}) {
        for (int32_t dtype : {KRASIS_BF16, KRASIS_F16}) {
            for (int32_t m_block : {16, 32, 64}) {
                Case c;
                c.group = group;
                c.dtype = dtype;
                c.m_block = m_block;
                c.scale_dtype = i % 5 < 3 ? dtype : dtype == KRASIS_BF16 ? KRASIS_F16 : KRASIS_BF16;
                c.out_dtype = i % 2 ? KRASIS_F32 : dtype;
                c.gated = i % 3 == 1;
                c.n = c.gated ? 384 : 192;
                c.top_k = 1 + i % 3;
                c.seed = static_cast<uint64_t>(++i);
                check_case(c);
            }
        }
    }
}

// Fewer and more steps along k than the ring has stages; one and several blocks of columns.
void check_shapes() {
    for (int64_t k : {64, 128, 192, 320, 448}) {
        Case c;
        c.k = k;
        c.n = k == 192 ? 576 : 64;
        c.group = k % 128 ? 64 : 128;
        c.count_factor = 0.3;
        c.m_block = k == 320 ? 16 : 64;
        check_case(c);
        c.gated = true;
        c.n = k == 192 ? 640 : 128;
        c.group = 32;
        check_case(c);
    }
}

// Row blocks, ranges of experts, fewer blocks than tiles: the same bits.
void check_same_bits() {
    Case c;
    c.gated = true;
    c.n = 640;
    c.count_factor = 0.5;
    Problem whole(c);
    whole.reset();
    CHECK_OK(whole.run(whole.args()));
    for (int32_t m_block : {16, 32, 64}) {
        c.m_block = m_block;
        Problem parts(c);
        parts.reset();
        auto args = parts.args();
        args.max_blocks_launched = 3;
        args.expert_end = 7;
        CHECK_OK(parts.run(args));
        parts.check(0, 7);
        args.expert_begin = 7;
        args.expert_end = kNumExperts;
        args.max_blocks_launched = 0;
        CHECK_OK(parts.run(args));
        CHECK(std::memcmp(whole.out().data(), parts.out().data(), whole.out().size()) == 0);
    }
}

// Experts, codes and scales further apart than 32 bits reach.
void check_far_records() {
    Case c;
    c.count_factor = 0.2;
    Problem near(c);
    near.reset();
    CHECK_OK(near.run(near.args()));
    constexpr int64_t kStride = int64_t{1} << 29, kCodes = 9 * kStride / 2, kScales = 9 * kStride;
    Region region(static_cast<size_t>(kScales + kNumExperts * kStride));
    if (!region.exists()) {
        std::printf("moe_gemm: no room for records 9 GiB apart: not tested\n");
        return;
    }
    Problem far(c);
    for (int e = 0; e < kNumExperts; ++e) far.move_record(e, region, e * kStride, kCodes, kScales);
    auto args = far.args();
    args.codes_offset = kCodes;
    args.scales_offset = kScales;
    far.reset();
    CHECK_OK(far.run(args));
    CHECK(std::memcmp(near.out().data(), far.out().data(), near.out().size()) == 0);
}

void check_absent_experts() {
    Case c;
    c.count_factor = 0.5;
    Problem problem(c);
    problem.forget(8);
    problem.forget(1);
    problem.reset();
    CHECK_OK(problem.run(problem.args()));
    problem.check(0, kNumExperts);
}

void check_refusals() {
    Case c;
    c.count_factor = 0.1;
    Problem problem(c);
    const auto good = problem.args();
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_moe_gemm(&args, nullptr) == status);
    };
    using Args = krasis_cuda_moe_gemm_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.activations = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.first_block = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.out_dtype = KRASIS_F16; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.slots_per_row = 0; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.expert_end = a.num_experts + 1; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.expert_begin = -1; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = 96; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.n = 160; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.gated = 1; });  // 192 columns: gate would be 96
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.group = 48; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.m_block = 48; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.out_stride = a.n - 8; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.codes_offset = 8; });
    CHECK(krasis_cuda_moe_gemm(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

#if !KRASIS_SIMT_DEVICE
// The kernel with a wait or a barrier left out must be noticed, whichever one it is.
void check_races() {
    Case c;
    c.k = 448;
    c.group = 64;
    c.count_factor = 0.1;
    Problem problem(c);
    namespace simt = krasis::simt;
    for (const simt::Fault fault : {simt::Fault::kNoWait, simt::Fault::kWaitOneLess, simt::Fault::kNoBarrier}) {
        for (unsigned from = 0; from < 4; ++from) {
            problem.reset();
            simt::planned_fault = {fault, from};
            CHECK(problem.run(problem.args()) == KRASIS_ERR_CUDA);
            simt::planned_fault = {};
            const std::string words = krasis_cuda_last_error();
            const char *expected = fault == simt::Fault::kNoBarrier ? "shared memory at byte" : "cp.async";
            CHECK(words.find(expected) != std::string::npos);
        }
    }
    problem.reset();
    CHECK_OK(problem.run(problem.args()));
    problem.check(0, kNumExperts);
}
#endif

}  // namespace

void run_moe_gemm() {
    check_layouts();
    check_shapes();
    check_same_bits();
    check_far_records();
    check_absent_experts();
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
