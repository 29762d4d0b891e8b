// test_int8_rows.cpp: dense W8A16 products, matrix and vector, against float64.
#include <cmath>
#include <string>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

struct Case {
    int64_t tokens, k, n;
    int32_t dtype, out_dtype;
    bool with_residual;
};

// Everything of one call; strides leave poisoned columns on both sides of the product.
struct Problem {
    Case c;
    int64_t x_stride, out_stride;
    Array<uint16_t> x;
    Array<int8_t> packed;
    std::vector<int8_t> codes;  // [n, k]
    Array<float> scales;
    Matrix residual, out;

    explicit Problem(const Case &given)
        : c(given),
          x_stride(c.k + 8),
          out_stride(c.n + 16),
          x(static_cast<size_t>(c.tokens * x_stride)),
          packed(static_cast<size_t>(c.n * c.k)),
          codes(static_cast<size_t>(c.n * c.k)),
          scales(static_cast<size_t>(c.n)),
          residual(static_cast<size_t>(c.tokens * out_stride), c.out_dtype),
          out(static_cast<size_t>(c.tokens * out_stride), c.out_dtype) {
        Random random(static_cast<uint64_t>(c.tokens * 1000 + c.n));
        x.poison();
        for (int64_t t = 0; t < c.tokens; ++t) {
            for (int64_t i = 0; i < c.k; ++i)
                x[static_cast<size_t>(t * x_stride + i)] = to_16(random.normal(), c.dtype);
            for (int64_t j = 0; j < c.n; ++j) residual.set(static_cast<size_t>(t * out_stride + j), random.normal());
        }
        for (int64_t j = 0; j < c.n; ++j) {
            scales[static_cast<size_t>(j)] = static_cast<float>(0.001 + 0.01 * random.uniform());
            for (int64_t i = 0; i < c.k; ++i) {
                const auto code = static_cast<int8_t>(random.below(256) - 128);
                codes[static_cast<size_t>(j * c.k + i)] = code;
                packed[static_cast<size_t>(((j / 32 * (c.k / 4) + i / 4) * 32 + j % 32) * 4 + i % 4)] = code;
            }
        }
    }

    krasis_cuda_int8_gemm_args args() {
        krasis_cuda_int8_gemm_args a{};
        a.x = x.upload();
        a.x_stride = x_stride;
        a.tokens = c.tokens;
        a.k = c.k;
        a.n = c.n;
        a.dtype = c.dtype;
        a.out_dtype = c.out_dtype;
        a.weight = packed.upload();
        a.scales = scales.upload();
        a.residual = c.with_residual ? residual.bytes.upload() : nullptr;
        a.out = out.bytes.upload();
        a.out_stride = out_stride;
        return a;
    }

    void check() const {
        for (int64_t t = 0; t < c.tokens; ++t) {
            for (int64_t j = 0; j < out_stride; ++j) {
                const auto at = static_cast<size_t>(t * out_stride + j);
                if (j >= c.n) {
                    CHECK(std::isnan(out.get(at)));
                    continue;
                }
                double value = 0, size = 0;
                for (int64_t i = 0; i < c.k; ++i) {
                    const double term = to_double(x[static_cast<size_t>(t * x_stride + i)], c.dtype) *
                                        codes[static_cast<size_t>(j * c.k + i)];
                    value += term;
                    size += std::fabs(term);
                }
                const double scale = scales[static_cast<size_t>(j)];
                value *= scale;
                size *= scale;
                if (c.with_residual) value += residual.get(at);
                CHECK(std::fabs(out.get(at) - value) <= 2e-6 * size + out.rounding() * std::fabs(value) + 0x1p-24);
            }
        }
    }
};

void check_shapes() {
    // Either side of every choice of kernel; columns that do not fill a block; fewer and more steps than the ring has
    // stages.
    constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 63, 64, 65, 128, 300};
    constexpr int64_t kSizes[][2] = {{64, 32}, {128, 160}, {320, 96}, {448, 288}};
    int i = 0;
    for (int64_t tokens : kTokens) {
        for (int repeat = 0; repeat < 2; ++repeat) {
            const auto &size = kSizes[(i + repeat * 2) % 4];
            const int32_t dtype = (i + repeat) % 2 ? KRASIS_BF16 : KRASIS_F16;
            Problem problem({tokens, size[0], size[1], dtype, i % 3 ? dtype : KRASIS_F32, i % 5 < 2});
            const auto args = problem.args();
            CHECK_OK(krasis_cuda_int8_gemm(&args, nullptr));
            problem.out.bytes.download();
            const int before = failures;
            problem.check();
            if (failures != before)
                std::printf("  with %d tokens, k %d, n %d\n", int(tokens), int(size[0]), int(size[1]));
        }
        ++i;
    }
}

// Many strips: the vector kernel with fewer warps each.
void check_wide_vectors() {
    for (int64_t tokens : {1, 2}) {
        Problem problem({tokens, 128, 8224, KRASIS_BF16, KRASIS_F32, tokens == 2});
        const auto args = problem.args();
        CHECK_OK(krasis_cuda_int8_gemm(&args, nullptr));
        problem.out.bytes.download();
        problem.check();
    }
}

void check_refusals() {
    Problem problem({4, 64, 32, KRASIS_BF16, KRASIS_F32, false});
    const auto good = problem.args();
    auto refused = [&](int32_t status, auto &&change) {
        auto args = good;
        change(args);
        CHECK(krasis_cuda_int8_gemm(&args, nullptr) == status);
    };
    using Args = krasis_cuda_int8_gemm_args;
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.weight = nullptr; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.dtype = KRASIS_F32; });
    refused(KRASIS_ERR_ARGUMENT, [](Args &a) { a.out_dtype = KRASIS_F16; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.k = 96; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.n = 48; });
    refused(KRASIS_ERR_SHAPE, [](Args &a) { a.x_stride = 60; });
    CHECK(krasis_cuda_int8_gemm(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

#if !KRASIS_SIMT_DEVICE
void check_races() {
    namespace simt = krasis::simt;
    for (int64_t tokens : {1, 12, 40, 90}) {
        Problem problem({tokens, 448, 96, KRASIS_BF16, KRASIS_F32, false});
        const auto args = problem.args();
        for (const simt::Fault fault : {simt::Fault::kNoWait, simt::Fault::kWaitOneLess, simt::Fault::kNoBarrier}) {
            if (tokens == 1 && fault != simt::Fault::kNoBarrier) continue;  // the vector kernel copies nothing
            for (unsigned from = 0; from < (tokens == 1 ? 1 : 4); ++from) {
                simt::planned_fault = {fault, from};
                CHECK(krasis_cuda_int8_gemm(&args, nullptr) == KRASIS_ERR_CUDA);
                simt::planned_fault = {};
                const char *expected = fault == simt::Fault::kNoBarrier ? "shared memory at byte" : "cp.async";
                CHECK(std::string(krasis_cuda_last_error()).find(expected) != std::string::npos);
            }
        }
    }
}
#endif

}  // namespace

void run_int8_rows() {
    check_shapes();
    check_wide_vectors();
    check_refusals();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
