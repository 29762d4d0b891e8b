// test_fused.cpp: launches that do the work of several, against those: the very same bits. What each of those computes
// is compared with float64 in tests of its own.
#include <cmath>
#include <cstring>

#include "krasis_cuda.h"
#include "matrix.h"
#include "moe_problem.h"
#include "route_arguments.h"
#include "suites.h"

namespace test {
namespace {

// A token and the weights of its norm.
struct Token {
    int64_t k;
    int32_t norm_dtype;
    Array<float> hidden;
    Matrix norm;

    Token(Random &random, int64_t size, int32_t dtype)
        : k(size), norm_dtype(dtype), hidden(static_cast<size_t>(size)), norm(static_cast<size_t>(size), dtype) {
        for (size_t i = 0; i < hidden.size(); ++i) {
            hidden[i] = 3 * random.normal();
            norm.set(i, random.normal());
        }
    }

    void norm_to(void *out, int32_t out_dtype) {
        const krasis_cuda_rms_norm_args args{hidden.upload(), norm.bytes.upload(), out,       1,   k,
                                             KRASIS_F32,      norm_dtype,          out_dtype, kEps};
        CHECK_OK(krasis_cuda_rms_norm(&args, nullptr));
    }

    static constexpr float kEps = 1e-6f;
};

bool same(const Matrix &a, const Matrix &b) {
    return a.bytes.size() == b.bytes.size() && std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
}

void check_norm_product(int64_t k, int64_t n, int32_t dtype, int32_t out_dtype, int32_t norm_dtype) {
    Random random(static_cast<uint64_t>(k + n));
    Token token(random, k, norm_dtype);
    Array<int8_t> weight(static_cast<size_t>(k * n));
    Array<float> scales(static_cast<size_t>(n));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(random.below(256) - 128);
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<float>(0.001 + 0.01 * random.uniform());
    Matrix x(static_cast<size_t>(k), dtype), expected(static_cast<size_t>(n), out_dtype),
        out(static_cast<size_t>(n) + 16, out_dtype);
    token.norm_to(x.bytes.upload(), dtype);
    krasis_cuda_int8_gemm_args two{};
    two.x = x.bytes.device();
    two.x_stride = two.k = k;
    two.tokens = 1;
    two.n = two.out_stride = n;
    two.dtype = dtype;
    two.out_dtype = out_dtype;
    two.weight = weight.upload();
    two.scales = scales.upload();
    two.out = expected.bytes.upload();
    CHECK_OK(krasis_cuda_int8_gemm(&two, nullptr));
    const krasis_cuda_norm_int8_args one{token.hidden.device(),
                                         token.norm.bytes.device(),
                                         k,
                                         n,
                                         norm_dtype,
                                         dtype,
                                         out_dtype,
                                         Token::kEps,
                                         weight.device(),
                                         scales.device(),
                                         out.bytes.upload()};
    CHECK_OK(krasis_cuda_norm_int8_gemv(&one, nullptr));
    expected.bytes.download();
    out.bytes.download();
    CHECK(std::isfinite(expected.get(0)));
    CHECK(std::memcmp(expected.bytes.data(), out.bytes.data(), expected.bytes.size()) == 0);
    CHECK(std::isnan(out.get(static_cast<size_t>(n))));
    auto refused = [&](int32_t status, auto &&change) {
        auto args = one;
        change(args);
        CHECK(krasis_cuda_norm_int8_gemv(&args, nullptr) == status);
    };
    using Args = krasis_cuda_norm_int8_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.norm = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = 96; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = KRASIS_CUDA_MAX_NORMED + 64; });
    CHECK(krasis_cuda_norm_int8_gemv(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

struct Choice {
    Matrix logits, weights;
    Array<int32_t> ids, gpu_ids, cpu_ids;
    Array<int64_t> counts;

    Choice(size_t experts, size_t top_k)
        : logits(experts, KRASIS_F32),
          weights(top_k, KRASIS_F32),
          ids(top_k),
          gpu_ids(top_k),
          cpu_ids(top_k),
          counts(experts) {}

    void write_to(krasis_cuda_route_args &args) {
        args.logits = reinterpret_cast<float *>(logits.bytes.upload());
        args.weights = reinterpret_cast<float *>(weights.bytes.upload());
        args.ids = ids.upload();
        args.gpu_ids = gpu_ids.upload();
        args.cpu_ids = cpu_ids.upload();
        args.counts = counts.upload();
    }

    void download() {
        logits.bytes.download();
        weights.bytes.download();
        ids.download();
        gpu_ids.download();
        cpu_ids.download();
        counts.download();
    }

    bool operator==(const Choice &other) const {
        const auto equal = [](const auto &a, const auto &b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        return same(logits, other.logits) && same(weights, other.weights) && equal(ids, other.ids) &&
               equal(gpu_ids, other.gpu_ids) && equal(cpu_ids, other.cpu_ids) && equal(counts, other.counts);
    }
};

void check_norm_route(int32_t score, int32_t weight_dtype, int32_t x_dtype, int64_t num_experts, int64_t top_k) {
    constexpr int64_t kSize = 576;
    Random random(static_cast<uint64_t>(score * 100 + num_experts));
    Token token(random, kSize, x_dtype);
    const auto experts = static_cast<size_t>(num_experts), columns = static_cast<size_t>(kSize);
    Matrix weight(experts * columns, weight_dtype), x(columns, x_dtype), expected_x(columns, x_dtype),
        normed(columns, KRASIS_F32), expected_normed(columns, KRASIS_F32);
    for (size_t i = 0; i < experts * columns; ++i) weight.set(i, 0.05f * random.normal());
    Array<uint8_t> resident(experts);
    for (size_t e = 0; e < experts; ++e) resident[e] = static_cast<uint8_t>(e % 3 != 0);
    Array<uint32_t> arrivals(1);
    Choice expected(experts, static_cast<size_t>(top_k)), chosen(experts, static_cast<size_t>(top_k));
    krasis_cuda_norm_route_args one{};
    one.route = plain_route_args();
    one.route.score = score;
    one.route.tokens = 1;
    one.route.num_experts = num_experts;
    one.route.top_k = top_k;
    one.route.normalize = 1;
    one.route.resident = resident.upload();
    auto several = one.route;
    expected.write_to(several);
    chosen.write_to(one.route);
    token.norm_to(expected_x.bytes.upload(), x_dtype);
    token.norm_to(expected_normed.bytes.upload(), KRASIS_F32);
    one.hidden = token.hidden.device();
    one.norm = token.norm.bytes.device();
    one.x = x.bytes.upload();
    one.normed = reinterpret_cast<float *>(normed.bytes.upload());
    one.weight = weight.bytes.upload();
    one.k = kSize;
    one.norm_dtype = one.x_dtype = x_dtype;
    one.weight_dtype = weight_dtype;
    one.eps = Token::kEps;
    one.arrivals = arrivals.upload();
    const krasis_cuda_router_args router{reinterpret_cast<const float *>(expected_normed.bytes.device()),
                                         one.weight,
                                         const_cast<float *>(several.logits),
                                         1,
                                         kSize,
                                         num_experts,
                                         weight_dtype,
                                         0};
    for (int repeat = 0; repeat < 2; ++repeat) {  // the counter must be left as zero
        CHECK_OK(krasis_cuda_router(&router, nullptr));
        CHECK_OK(krasis_cuda_route(&several, nullptr));
        CHECK_OK(krasis_cuda_norm_route(&one, nullptr));
        expected.download();
        chosen.download();
        CHECK(chosen == expected);
        CHECK(chosen.counts[static_cast<size_t>(chosen.ids[0])] == repeat + 1);
    }
    x.bytes.download();
    expected_x.bytes.download();
    normed.bytes.download();
    expected_normed.bytes.download();
    CHECK(same(x, expected_x) && same(normed, expected_normed));
    auto refused = [&](int32_t status, auto &&change) {
        auto args = one;
        change(args);
        CHECK(krasis_cuda_norm_route(&args, nullptr) == status);
    };
    using Args = krasis_cuda_norm_route_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.arrivals = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.route.tokens = 2; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = 16384; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.route.groups = 2; });
    CHECK(krasis_cuda_norm_route(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

// Slots that name their experts: the bits of sorted ones, and, added up, those of krasis_cuda_moe_reduce. Twice: the
// counters must be left as zeros.
void check_named_slots() {
    int i = 0;
    for (int64_t group : {32, 64, 128, 1088}) {
        for (bool gated : {false, true}) {
            MoeCase c;
            c.k = group == 128 ? 1152 : 1088;
            c.n = 256;
            c.group = group;
            c.dtype = c.out_dtype = i % 2 ? KRASIS_BF16 : KRASIS_F16;
            c.scale_dtype = i % 3 == 0 && group == 32 ? KRASIS_CUDA_E8M0 : c.dtype;
            c.gated = gated;
            c.biased = i % 3 == 1;
            c.m_block = 16;
            c.top_k = 4;
            c.count_factor = 0.05;
            c.seed = static_cast<uint64_t>(400 + ++i);
            MoeProblem sorted(c), named(c);
            sorted.reset();
            CHECK_OK(sorted.run(sorted.args()));
            auto args = named.args();
            args.ids = named.ids().upload();
            args.sorted_slots = args.block_experts = args.first_block = nullptr;
            const auto num_slots = static_cast<size_t>(named.num_slots()), top_k = static_cast<size_t>(c.top_k);
            const size_t tokens = num_slots / top_k, columns = static_cast<size_t>(c.n);
            Array<float> weights(num_slots), hidden(tokens * columns), expected(tokens * columns);
            Array<uint32_t> arrivals(tokens * columns / 64);
            Random random(c.seed);
            for (size_t s = 0; s < num_slots; ++s) weights[s] = random.normal();
            for (size_t s = 0; s < hidden.size(); ++s) hidden[s] = expected[s] = random.normal();
            if (!gated) {
                args.slot_weights = weights.upload();
                args.hidden = hidden.upload();
                args.arrivals = arrivals.upload();
                args.top_k = c.top_k;
            }
            krasis_cuda_moe_reduce_args sum{};
            sum.slots_dtype = c.dtype;
            sum.out_dtype = KRASIS_F32;
            sum.ids = args.ids;
            sum.weights = args.slot_weights;
            sum.tokens = static_cast<int64_t>(tokens);
            sum.top_k = c.top_k;
            sum.n = c.n;
            sum.num_experts = kNumExperts;
            for (int repeat = 0; repeat < 2; ++repeat) {
                named.reset();
                CHECK_OK(named.run(args));
                named.check(0, kNumExperts);
                CHECK(std::memcmp(sorted.out().data(), named.out().data(), named.out().size()) == 0);
                if (gated) continue;
                // Rows of slots without gaps, as the sum takes them.
                Array<uint16_t> slots(num_slots * columns);
                for (size_t s = 0; s < num_slots; ++s) {
                    const size_t from = s * static_cast<size_t>(named.out_stride()) * 2;
                    std::memcpy(slots.data() + s * columns, named.out().data() + from, columns * 2);
                }
                sum.slots = slots.upload();
                sum.residual = sum.out = expected.upload();
                CHECK_OK(krasis_cuda_moe_reduce(&sum, nullptr));
                expected.download();
                hidden.download();
                CHECK(std::memcmp(expected.data(), hidden.data(), hidden.size() * sizeof(float)) == 0);
            }
        }
    }
}

void check_named_refusals() {
    MoeCase c;
    c.m_block = 16;
    c.count_factor = 0.05;
    c.out_dtype = c.dtype;
    MoeProblem problem(c);
    auto good = problem.args();
    good.ids = problem.ids().upload();
    Array<float> words(64);
    Array<uint32_t> arrivals(64);
    good.slot_weights = good.hidden = words.upload();
    good.arrivals = arrivals.upload();
    good.top_k = c.top_k;
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_moe_gemm(&args, nullptr) == status);
    };
    using Args = krasis_cuda_moe_gemm_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.ids = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.slot_weights = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.arrivals = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.top_k = 5; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.out_dtype = KRASIS_F32; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.m_block = 32; });
}

}  // namespace

void run_fused() {
    check_named_slots();
    check_named_refusals();
    check_norm_product(64, 32, KRASIS_BF16, KRASIS_BF16, KRASIS_F32);
    check_norm_product(2880, 96, KRASIS_F16, KRASIS_F32, KRASIS_BF16);
    check_norm_product(128, 8224, KRASIS_BF16, KRASIS_F32, KRASIS_BF16);  // fewer warps for many strips
    check_norm_route(KRASIS_CUDA_SCORE_SOFTMAX, KRASIS_BF16, KRASIS_BF16, 128, 8);
    check_norm_route(KRASIS_CUDA_SCORE_SIGMOID, KRASIS_F32, KRASIS_F16, 40, 6);
}

}  // namespace test
