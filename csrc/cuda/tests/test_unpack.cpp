// test_unpack.cpp: weights unpacked to 16-bit matrices, bit for bit what float64 rounds to; and rows reordered.
#include <cmath>
#include <memory>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

struct MarlinCase {
    int64_t k, n, group;
    int32_t scale_dtype, out_dtype;
};

// The float64 product rounded once: it has at most 16 significant bits, so no double rounding.
uint16_t rounded(double value, int32_t dtype) { return to_16(static_cast<float>(value), dtype); }

// Three experts of four, the middle one absent, from an offset table entry on.
void check_marlin(const MarlinCase &c) {
    constexpr int32_t kBegin = 1, kCount = 3;
    Random random(static_cast<uint64_t>(c.k + c.n + c.group));
    const int64_t codes_offset = 48, scales_offset = codes_offset + MarlinWeight::codes_bytes(c.k, c.n) + 16;
    const int64_t bytes = scales_offset + MarlinWeight::scales_bytes(c.k, c.n, c.group);
    std::vector<MarlinWeight> weights;
    std::vector<std::unique_ptr<Array<uint8_t>>> records;
    Array<const void *> table(kBegin + kCount);
    for (int32_t e = 0; e < kBegin + kCount; ++e) {
        weights.emplace_back(random, c.k, c.n, c.group, c.scale_dtype);
        records.push_back(std::make_unique<Array<uint8_t>>(static_cast<size_t>(bytes)));
        weights.back().pack_codes(reinterpret_cast<uint32_t *>(records.back()->data() + codes_offset));
        weights.back().pack_scales(reinterpret_cast<uint16_t *>(records.back()->data() + scales_offset));
        table[static_cast<size_t>(e)] = e == 2 ? nullptr : records.back()->upload();
    }
    const auto each = static_cast<size_t>(c.k * c.n);
    Array<uint16_t> out(kCount * each);
    out.poison();
    krasis_cuda_marlin_dequant_args a{};
    a.expert_base = table.upload();
    a.codes_offset = codes_offset;
    a.scales_offset = scales_offset;
    a.scale_dtype = c.scale_dtype;
    a.out_dtype = c.out_dtype;
    a.group = c.group;
    a.k = c.k;
    a.n = c.n;
    a.expert_begin = kBegin;
    a.count = kCount;
    a.out = out.upload();
    CHECK_OK(krasis_cuda_marlin_dequant(&a, nullptr));
    out.download();
    for (int32_t e = 0; e < kCount; ++e) {
        const auto values = weights[static_cast<size_t>(kBegin + e)].values();
        for (int64_t column = 0; column < c.n; ++column) {
            for (int64_t row = 0; row < c.k; ++row) {
                const uint16_t got = out[static_cast<size_t>(e) * each + static_cast<size_t>(column * c.k + row)];
                const uint16_t right = rounded(values[static_cast<size_t>(row * c.n + column)], c.out_dtype);
                CHECK(got == (e + kBegin == 2 ? 0xffff : right));
            }
        }
    }
}

void check_marlin_refusals() {
    Array<const void *> table(1);
    Array<uint16_t> out(64 * 64);
    krasis_cuda_marlin_dequant_args good{};
    good.expert_base = table.upload();
    good.scales_offset = 4096;
    good.group = 64;
    good.k = good.n = 64;
    good.scale_dtype = good.out_dtype = KRASIS_BF16;
    good.count = 1;
    good.out = out.upload();
    CHECK(krasis_cuda_marlin_dequant(&good, nullptr) == KRASIS_OK);
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_marlin_dequant(&args, nullptr) == status);
    };
    using Args = krasis_cuda_marlin_dequant_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.out = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.out_dtype = KRASIS_F32; });
    refused(KRASIS_ERR_RANGE, [](Args &a) { a.expert_begin = -1; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = 96; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.n = 96; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.group = 128; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.scales_offset += 8; });
    CHECK(krasis_cuda_marlin_dequant(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

void check_int8(int64_t n, int64_t k, int32_t dtype) {
    Random random(static_cast<uint64_t>(n + k));
    const auto count = static_cast<size_t>(n * k);
    Array<int8_t> packed(count);
    std::vector<int8_t> codes(count);
    Array<float> scales(static_cast<size_t>(n));
    Array<uint16_t> out(count);
    out.poison();
    for (int64_t j = 0; j < n; ++j) {
        scales[static_cast<size_t>(j)] = static_cast<float>(0.001 + 0.01 * random.uniform());
        for (int64_t i = 0; i < k; ++i) {
            const auto code = static_cast<int8_t>(random.below(256) - 128);
            codes[static_cast<size_t>(j * k + i)] = code;
            packed[static_cast<size_t>(((j / 32 * (k / 4) + i / 4) * 32 + j % 32) * 4 + i % 4)] = code;
        }
    }
    CHECK_OK(krasis_cuda_int8_dequant(packed.upload(), scales.upload(), n, k, dtype, out.upload(), nullptr));
    out.download();
    for (size_t i = 0; i < count; ++i) {
        // In fp32, rounded once more: the bits of the product of two floats.
        const float value = static_cast<float>(codes[i]) * scales[i / static_cast<size_t>(k)];
        CHECK(out[i] == to_16(value, dtype));
    }
    CHECK(krasis_cuda_int8_dequant(packed.device(), scales.device(), n, k + 32, dtype, out.device(), nullptr) ==
          KRASIS_ERR_SHAPE);
    CHECK(krasis_cuda_int8_dequant(packed.device(), nullptr, n, k, dtype, out.device(), nullptr) ==
          KRASIS_ERR_ARGUMENT);
}

// Slots sorted for five experts, two of them without slots, and rows gathered and scattered for a range of experts.
struct Reordered {
    static constexpr int32_t kExperts = 5, kM = 16;
    static constexpr int64_t kTokens = 40, kTopK = 3, kSlots = kTokens * kTopK, kColumns = 72, kStride = 80;
    Array<int32_t> ids{kSlots}, sorted, blocks, first{kExperts + 1}, counts{kExperts}, invalid{1}, ends{kExperts};
    Array<uint16_t> x{kTokens * kStride}, rows, out{kSlots * kStride};
    Array<int64_t> executed{1};
    int64_t max_rows;

    Reordered()
        : sorted(static_cast<size_t>(krasis_cuda_align_max_blocks(kSlots, kExperts, kM) * kM)),
          blocks(sorted.size() / kM),
          rows(sorted.size() * kColumns),
          max_rows(static_cast<int64_t>(sorted.size())) {
        Random random(5);
        for (size_t i = 0; i < kSlots; ++i) {
            const int64_t e = random.below(4);
            ids[i] = static_cast<int32_t>(e == 1 ? -1 : e);  // experts 1 and 4 have none
        }
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(random.below(65000));
        const krasis_cuda_align_args a{ids.upload(),    kSlots,          kExperts,       kM,
                                       sorted.upload(), blocks.upload(), first.upload(), counts.upload(),
                                       invalid.upload()};
        CHECK_OK(krasis_cuda_moe_align(&a, nullptr));
        for (auto *array : {&sorted, &first}) array->download();
    }

    // Rows of experts begin..end in order; -1 for padding.
    std::vector<int32_t> expected(int32_t begin, int32_t end) const {
        std::vector<int32_t> slots;
        for (int32_t e = begin; e < end; ++e) {
            for (int32_t s = 0; s < kSlots; ++s) {
                if (ids[static_cast<size_t>(s)] == e) slots.push_back(s);
            }
            while (slots.size() % kM) slots.push_back(-1);
        }
        return slots;
    }

    krasis_cuda_moe_gather_args gather_args(int32_t begin, int32_t end) {
        rows.poison();
        krasis_cuda_moe_gather_args a{};
        a.x = x.upload();
        a.x_stride = kStride;
        a.slots_per_row = kTopK;
        a.k = kColumns;
        a.sorted_slots = sorted.device();
        a.first_block = first.device();
        a.m_block = kM;
        a.expert_begin = begin;
        a.expert_end = end;
        a.dtype = KRASIS_BF16;
        a.num_slots = kSlots;
        a.max_rows = max_rows;
        a.out = rows.upload();
        a.ends = ends.upload();
        return a;
    }

    krasis_cuda_moe_scatter_args scatter_args(int32_t begin, int32_t end) {
        out.poison();
        executed[0] = 7;
        krasis_cuda_moe_scatter_args a{};
        a.rows = rows.device();
        a.n = kColumns;
        a.sorted_slots = sorted.device();
        a.first_block = first.device();
        a.m_block = kM;
        a.expert_begin = begin;
        a.expert_end = end;
        a.dtype = KRASIS_F16;
        a.num_slots = kSlots;
        a.max_rows = max_rows;
        a.out_stride = kStride;
        a.out = out.upload();
        a.num_executed = executed.upload();
        return a;
    }

    void check_gathered(const std::vector<int32_t> &slots, int32_t begin, int32_t end) {
        rows.download();
        ends.download();
        for (size_t i = 0; i < rows.size(); ++i) {
            const size_t row = i / kColumns, column = i % kColumns;
            const bool inside = row < slots.size();
            const size_t from =
                inside && slots[row] >= 0 ? static_cast<size_t>(slots[row] / kTopK) * kStride + column : 0;
            CHECK(rows[i] == (!inside ? 0xffff : slots[row] < 0 ? 0 : x[from]));
        }
        for (int32_t e = begin; e < end; ++e) {
            const auto rows_so_far = static_cast<int64_t>(expected(begin, e + 1).size());
            CHECK(ends[static_cast<size_t>(e - begin)] == std::min(rows_so_far, max_rows));
        }
    }

    void check_scattered(const std::vector<int32_t> &slots) {
        out.download();
        executed.download();
        std::vector<int64_t> row_of(kSlots, -1);
        int64_t count = 0;
        for (size_t row = 0; row < slots.size(); ++row) {
            if (slots[row] < 0) continue;
            row_of[static_cast<size_t>(slots[row])] = static_cast<int64_t>(row);
            ++count;
        }
        for (size_t i = 0; i < out.size(); ++i) {
            const int64_t row = row_of[i / kStride];
            const size_t column = i % kStride;
            const bool written = row >= 0 && column < kColumns;
            CHECK(out[i] == (written ? rows[static_cast<size_t>(row) * kColumns + column] : 0xffff));
        }
        CHECK(executed[0] == 7 + count);
    }

    void run(int32_t begin, int32_t end) {
        const auto gather = gather_args(begin, end);
        CHECK_OK(krasis_cuda_moe_gather(&gather, nullptr));
        std::vector<int32_t> slots = expected(begin, end);
        if (static_cast<int64_t>(slots.size()) > max_rows) slots.resize(static_cast<size_t>(max_rows));
        check_gathered(slots, begin, end);
        const auto scatter = scatter_args(begin, end);
        CHECK_OK(krasis_cuda_moe_scatter(&scatter, nullptr));
        check_scattered(slots);
    }
};

void check_reordering() {
    Reordered problem;
    problem.run(0, Reordered::kExperts);
    problem.run(2, 4);
    problem.run(1, 2);
    problem.run(4, 5);
    problem.max_rows = 40;  // no room for all: nothing behind it is touched
    problem.run(0, 4);
    auto gather = problem.gather_args(0, 4);
    gather.k = 68;
    CHECK(krasis_cuda_moe_gather(&gather, nullptr) == KRASIS_ERR_SHAPE);
    gather.k = Reordered::kColumns;
    gather.ends = nullptr;
    CHECK(krasis_cuda_moe_gather(&gather, nullptr) == KRASIS_ERR_ARGUMENT);
    auto scatter = problem.scatter_args(0, 4);
    scatter.out_stride = 64;
    CHECK(krasis_cuda_moe_scatter(&scatter, nullptr) == KRASIS_ERR_SHAPE);
    scatter.out_stride = Reordered::kStride;
    scatter.expert_begin = 5;
    CHECK(krasis_cuda_moe_scatter(&scatter, nullptr) == KRASIS_ERR_RANGE);
}

}  // namespace

void run_unpack() {
    // k that fills the last block of four warps, and k that does not; every group, and one scale a channel.
    check_marlin({256, 128, 128, KRASIS_BF16, KRASIS_BF16});
    check_marlin({320, 64, 32, KRASIS_F16, KRASIS_BF16});
    check_marlin({64, 192, 64, KRASIS_F16, KRASIS_F16});
    check_marlin({448, 64, 448, KRASIS_BF16, KRASIS_F16});
    check_marlin({128, 128, 128, KRASIS_F16, KRASIS_BF16});
    check_marlin_refusals();
    check_int8(96, 320, KRASIS_BF16);
    check_int8(32, 64, KRASIS_F16);
    check_int8(64, 512, KRASIS_BF16);
    check_reordering();
}

}  // namespace test
