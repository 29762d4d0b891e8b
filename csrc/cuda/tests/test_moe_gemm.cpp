// test_moe_gemm.cpp: the grouped product against float64 on every layout, ragged row counts and both 16-bit types.
#include <string>

#include "marlin_dequant.cuh"
#include "moe_problem.h"
#include "suites.h"

namespace test {
namespace {

using Case = MoeCase;
using Problem = MoeProblem;

// Where docs/FORMAT.md says that weights (k, n) lie: word and nibble, in a weight of 64 columns.
void check_packing() {
    constexpr int64_t kPlaces[][4] = {{0, 0, 0, 0}, {1, 0, 0, 4},  {8, 0, 0, 1},  {9, 0, 0, 5},   {0, 8, 0, 2},
                                      {2, 0, 4, 0}, {0, 1, 16, 0}, {0, 16, 1, 0}, {5, 37, 90, 4}, {15, 63, 127, 7}};
    for (const auto &place : kPlaces) {
        CHECK(MarlinWeight::word_of(place[0], place[1], 64) == place[2]);
        CHECK(MarlinWeight::nibble_of(place[0], place[1]) == place[3]);
    }
}

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
            for (int32_t m_block : {16, 32, 64, 128}) {
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
    for (int64_t k : {64, 128, 192, 320, 448, 1024}) {
        Case c;
        c.k = k;
        c.n = k == 192 ? 576 : 64;
        c.group = k == 1024 ? k : k % 128 ? 64 : 128;
        c.count_factor = 0.3;
        c.m_block = k == 320 ? 16 : k > 400 ? 128 : 64;
        check_case(c);
        c.gated = true;
        c.n = k == 192 ? 640 : 128;
        c.group = k == 1024 ? 128 : 32;
        check_case(c);
    }
}

// Sums are kept in units of the running group's scale: scales from 2^-20 to 2^20, a third of them zero.
void check_wild_scales() {
    for (int64_t group : {32, 64}) {
        Case c;
        c.k = 448;
        c.group = group;
        c.count_factor = 0.3;
        c.wild_scales = true;
        c.m_block = group == 32 ? 16 : 128;
        check_case(c);
    }
}

// Decode: at most 64 slots, which have a kernel of their own. Experts with one row, with five, and with two blocks.
void check_few_slots() {
    int i = 0;
    for (int64_t group : {32, 64, 128, 1088}) {
        for (int32_t dtype : {KRASIS_BF16, KRASIS_F16}) {
            for (bool gated : {false, true}) {
                Case c;
                c.k = group == 128 ? 1152 : 1088;  // chunks of 128 for more than eight warps; the last one half full
                c.n = 256;
                c.group = group;
                c.dtype = dtype;
                c.scale_dtype = i % 3 ? dtype : dtype == KRASIS_BF16 ? KRASIS_F16 : KRASIS_BF16;
                c.out_dtype = i % 2 ? KRASIS_F32 : dtype;
                c.gated = gated;
                c.m_block = 16;
                c.top_k = 1 + i % 2;
                c.count_factor = 0.08;
                c.seed = static_cast<uint64_t>(100 + ++i);
                check_case(c);
            }
        }
    }
    Case c;
    c.m_block = 16;
    c.count_factor = 0.08;
    Problem problem(c);
    problem.forget(5);
    auto args = problem.args();
    CHECK(args.num_slots <= 64);
    args.max_blocks_launched = 2;
    args.expert_begin = 3;
    problem.reset();
    CHECK_OK(problem.run(args));
    problem.check(3, kNumExperts);
#if !KRASIS_SIMT_DEVICE
    for (unsigned from = 0; from < 3; ++from) {
        krasis::simt::planned_fault = {krasis::simt::Fault::kNoBarrier, from};
        problem.reset();
        CHECK(problem.run(args) == KRASIS_ERR_CUDA);
        krasis::simt::planned_fault = {};
    }
#endif
}

// Biases of the first and the second product, every activation, every kernel; of plain codes and of MXFP4.
void check_biases_and_activations() {
    int i = 0;
    for (int32_t m_block : {16, 16, 32, 64, 128}) {
        for (int32_t activation = KRASIS_CUDA_SILU; activation <= KRASIS_CUDA_RELU_SQUARED; ++activation) {
            Case c;
            c.m_block = m_block;
            c.k = 128;
            c.gated = activation == KRASIS_CUDA_SILU ? i % 2 : activation != KRASIS_CUDA_RELU_SQUARED;
            c.activation = activation;
            c.biased = i % 3 != 2;
            c.n = c.gated ? 384 : 192;
            c.dtype = i % 2 ? KRASIS_F16 : KRASIS_BF16;
            c.group = 32;
            c.scale_dtype = i % 4 < 2 ? KRASIS_CUDA_E8M0 : KRASIS_BF16;
            c.out_dtype = i % 5 < 2 ? c.dtype : KRASIS_F32;
            c.count_factor = i < 5 ? 0.08 : 0.15;  // up to 64 slots have a kernel of their own
            c.seed = static_cast<uint64_t>(200 + ++i);
            check_case(c);
        }
    }
}

// MXFP4: scales are part of the weights. Odd numbers of steps; scales far apart, and of empty blocks.
void check_e2m1() {
    int i = 0;
    for (int32_t m_block : {16, 16, 32, 64, 128}) {
        for (int64_t k : {64, 448, 1088}) {
            if (k == 1088 && m_block != 16) continue;  // longer than all warps take at a time
            Case c;
            c.m_block = m_block;
            c.k = k;
            c.gated = i % 2;
            c.n = c.gated ? 384 : 320;
            c.group = 32;
            c.scale_dtype = KRASIS_CUDA_E8M0;
            c.count_factor = i < 3 ? 0.08 : 0.15;
            c.wild_scales = !c.gated;
            c.seed = static_cast<uint64_t>(300 + ++i);
            check_case(c);
        }
    }
}

#if !KRASIS_SIMT_DEVICE
// Every code with every scale that a type has room for: exactly the weight.
void check_e2m1_exactly() {
    using krasis::Bf16, krasis::F16, krasis::cuda::block_unit, krasis::cuda::dequantize_e2m1;
    const auto check = [](auto type, int first, int last) {
        using Type = decltype(type);
        for (int e = first; e <= last; ++e) {
            for (int code = 0; code < 16; ++code) {
                for (int nibble = 0; nibble < 8; ++nibble) {
                    const uint32_t other = code ? 0x00000000u : 0xffffffffu;
                    const uint32_t word = (other & ~(15u << (4 * nibble))) | static_cast<uint32_t>(code)
                                                                                 << (4 * nibble);
                    uint32_t b[2][2];
                    dequantize_e2m1<Type>(word, static_cast<uint32_t>(e | e << 8), b);
                    const uint32_t pair = b[nibble % 4 / 2][nibble % 2];
                    const auto bits = static_cast<uint16_t>(pair >> (16 * (nibble / 4)));
                    const double value = static_cast<double>(Type::to_float(bits)) * block_unit(type);
                    CHECK(value == std::ldexp(kE2m1[code], e - 127));
                }
            }
        }
    };
    check(Bf16{}, 65, 192);
    check(F16{}, 108, 132);
}
#endif

// Ranges of experts, fewer blocks than tiles: the same bits.
void check_same_bits() {
    Case c;
    c.gated = true;
    c.n = 640;
    c.count_factor = 0.5;
    for (int32_t m_block : {16, 32, 64, 128}) {
        c.m_block = m_block;
        Problem whole(c), parts(c);
        whole.reset();
        CHECK_OK(whole.run(whole.args()));
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
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.gated = 1, a.activation = KRASIS_CUDA_RELU_SQUARED; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.activation = -1; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.scale_dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.up_bias = reinterpret_cast<const float *>(a.out); });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.scale_dtype = KRASIS_CUDA_E8M0; });  // in groups of 128
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
void check_wide_blocks() {
    for (int64_t group : {32, 64, 128, 256}) {
        Case c;
        c.group = group;
        c.m_block = 128;
        c.dtype = group == 64 ? KRASIS_F16 : KRASIS_BF16;
        if (group == 32) c.scale_dtype = KRASIS_CUDA_E8M0;
        c.gated = group == 128;
        c.n = c.gated ? 384 : 192;
        check_case(c);
    }
}

// The kernel with a wait or a barrier left out must be noticed, whichever one it is.
void check_races(int32_t m_block, int32_t scale_dtype = KRASIS_BF16) {
    Case c;
    c.k = 448;
    c.group = scale_dtype == KRASIS_CUDA_E8M0 ? 32 : 64;
    c.scale_dtype = scale_dtype;
    c.m_block = m_block;
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
    check_packing();
    check_layouts();
    check_shapes();
    check_wild_scales();
    check_few_slots();
    check_biases_and_activations();
    check_e2m1();
    check_same_bits();
    check_far_records();
    check_absent_experts();
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    for (int32_t m_block : {16, 64, 128}) check_races(m_block);
    check_e2m1_exactly();
    // Blocks of 128 rows ran by wgmma; now by mma.sync, as on targets without it.
    krasis::simt::offers_wgmma = false;
    check_wide_blocks();
    check_races(128);
    check_races(128, KRASIS_CUDA_E8M0);
    krasis::simt::offers_wgmma = true;
#endif
}

}  // namespace test
