// test_moe_align.cpp: sorting slots by expert against a plain loop.
#include <string>

#include "array.h"
#include "krasis_cuda.h"
#include "suites.h"

namespace test {
namespace {

struct Sorted {
    Array<int32_t> slots, experts, first, counts, invalid;
    Sorted(int64_t num_slots, int32_t num_experts, int32_t m_block)
        : slots(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, num_experts, m_block) * m_block), -7),
          experts(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, num_experts, m_block)), -7),
          first(static_cast<size_t>(num_experts) + 1, -7),
          counts(static_cast<size_t>(num_experts), -7),
          invalid(1, -7) {}

    int32_t run(Array<int32_t> &ids, int32_t num_experts, int32_t m_block) {
        const krasis_cuda_align_args args{ids.upload(),    static_cast<int64_t>(ids.size()),
                                          num_experts,     m_block,
                                          slots.upload(),  experts.upload(),
                                          first.upload(),  counts.upload(),
                                          invalid.upload()};
        const int32_t status = krasis_cuda_moe_align(&args, nullptr);
        for (auto *array : {&slots, &experts, &first, &counts, &invalid}) array->download();
        return status;
    }
};

void check_against_loop(Array<int32_t> &ids, int32_t num_experts, int32_t m_block) {
    Sorted sorted(static_cast<int64_t>(ids.size()), num_experts, m_block);
    CHECK_OK(sorted.run(ids, num_experts, m_block));
    size_t row = 0, invalid = 0;
    for (size_t i = 0; i < ids.size(); ++i) invalid += ids[i] < -1 || ids[i] >= num_experts;
    CHECK(sorted.invalid[0] == static_cast<int32_t>(invalid));
    for (int32_t e = 0; e < num_experts; ++e) {
        const auto index = static_cast<size_t>(e);
        CHECK(sorted.first[index] == static_cast<int32_t>(row) / m_block);
        int32_t count = 0;
        for (size_t i = 0; i < ids.size(); ++i) {
            if (ids[i] != e) continue;
            CHECK(sorted.slots[row] == static_cast<int32_t>(i));
            ++row;
            ++count;
        }
        CHECK(sorted.counts[index] == count);
        for (; row % static_cast<size_t>(m_block); ++row) CHECK(sorted.slots[row] == -1);
        for (int32_t b = sorted.first[index]; b < static_cast<int32_t>(row) / m_block; ++b) {
            CHECK(sorted.experts[static_cast<size_t>(b)] == e);
        }
    }
    CHECK(sorted.first[static_cast<size_t>(num_experts)] == static_cast<int32_t>(row) / m_block);
    CHECK(row <= sorted.slots.size());
    for (size_t i = row; i < sorted.slots.size(); ++i) CHECK(sorted.slots[i] == -7);
}

void check_random() {
    Random random(3);
    constexpr int64_t kSizes[] = {1, 2, 8, 31, 250, 2047, 2048, 2049, 9000};
    constexpr int32_t kExperts[] = {1, 3, 8, 32, 33, 128, 160};
    int i = 0;
    for (int64_t size : kSizes) {
        const int32_t num_experts = kExperts[++i % 7];
        Array<int32_t> ids(static_cast<size_t>(size));
        for (size_t s = 0; s < ids.size(); ++s) {
            // Uneven: small ids are drawn more often; one in eight is skipped.
            const auto drawn = random.uniform() * random.uniform() * num_experts;
            ids[s] = random.below(8) ? static_cast<int32_t>(drawn) : -1;
        }
        check_against_loop(ids, num_experts, 16 << i % 3);
    }
}

void check_extremes() {
    Array<int32_t> same(700, 2);
    check_against_loop(same, 5, 64);
    Array<int32_t> skipped(70, -1);
    check_against_loop(skipped, 5, 16);
    Array<int32_t> bad(70, 4);
    bad[3] = 5;
    bad[9] = -2;
    bad[60] = 0x7fffffff;
    check_against_loop(bad, 5, 16);
    Array<int32_t> empty(0);
    check_against_loop(empty, 5, 16);
    CHECK(krasis_cuda_moe_m_block(8, 128) == 16 && krasis_cuda_moe_m_block(8000, 128) == 64);
    CHECK(krasis_cuda_moe_m_block(80000, 128) == (krasis::simt::has_wgmma() ? 128 : 64));
    CHECK(krasis_cuda_align_max_blocks(8, 128, 16) == 8);
    CHECK(krasis_cuda_align_max_blocks(1, 128, 64) == 1);
}

void check_refusals() {
    Array<int32_t> ids(8);
    Sorted sorted(8, 4, 16);
    CHECK(sorted.run(ids, 4, 24) == KRASIS_ERR_SHAPE);
    CHECK(sorted.run(ids, 0, 16) == KRASIS_ERR_RANGE);
    CHECK(krasis_cuda_moe_align(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

#if !KRASIS_SIMT_DEVICE
void check_races() {
    Array<int32_t> ids(5000, 1);
    Sorted sorted(5000, 4, 16);
    for (unsigned from = 0; from < 2; ++from) {
        krasis::simt::planned_fault = {krasis::simt::Fault::kNoBarrier, from};
        CHECK(sorted.run(ids, 4, 16) == KRASIS_ERR_CUDA);
        krasis::simt::planned_fault = {};
        CHECK(std::string(krasis_cuda_last_error()).find("shared memory at byte") != std::string::npos);
    }
}
#endif

}  // namespace

void run_moe_align() {
    check_random();
    check_extremes();
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
