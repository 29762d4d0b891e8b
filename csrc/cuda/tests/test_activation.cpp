// test_activation.cpp: activations of dense and shared MLPs, and rows added to the residual, against float64.
#include <cmath>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

constexpr float kLimit = 1.5f, kAlpha = 1.702f;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double cut(double x) { return std::fmin(std::fmax(x, -double{kLimit}), double{kLimit}); }

double activated(int32_t kind, double g, double u) {
    const double low = std::fmin(g, double{kLimit});
    switch (kind) {
        case KRASIS_CUDA_GELU_TANH:
            return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
        case KRASIS_CUDA_SWIGLU_OFFSET:
            return low * sigmoid(double{kAlpha} * low) * (cut(u) + 1);
        case KRASIS_CUDA_SILU_CLAMPED_BEFORE:
            return low * sigmoid(low) * cut(u);
        case KRASIS_CUDA_SILU_CLAMPED_AFTER:
            return std::fmin(g * sigmoid(g), double{kLimit}) * cut(u);
        case KRASIS_CUDA_RELU_SQUARED:
            return u > 0 ? u * u : 0;
        default:
            return g * sigmoid(g) * u;
    }
}

void check_activation(int32_t kind, int32_t dtype, bool with_bias) {
    constexpr size_t kRows = 5, kColumns = 264;
    const size_t width = kind == KRASIS_CUDA_RELU_SQUARED ? kColumns : 2 * kColumns, stride = width + 16;
    constexpr size_t kOutStride = kColumns + 8;
    Random random(static_cast<uint64_t>(kind * 8 + dtype));
    Matrix x(kRows * stride, dtype), out(kRows * kOutStride, dtype);
    Array<float> bias(width);
    for (size_t i = 0; i < width; ++i) bias[i] = random.normal();
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t i = 0; i < width; ++i) x.set(r * stride + i, 3 * random.normal());
    }
    krasis_cuda_activation_args args{};
    args.x = x.bytes.upload();
    args.x_stride = static_cast<int64_t>(stride);
    args.tokens = kRows;
    args.n = kColumns;
    args.bias = with_bias ? bias.upload() : nullptr;
    args.out = out.bytes.upload();
    args.out_stride = kOutStride;
    args.dtype = dtype;
    args.kind = kind;
    args.limit = kLimit;
    args.alpha = kAlpha;
    CHECK_OK(krasis_cuda_gated_activation(&args, nullptr));
    out.bytes.download();
    auto of = [&](size_t row, size_t column) { return x.get(row * stride + column) + (with_bias ? bias[column] : 0); };
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t i = 0; i < kColumns; ++i) {
            const bool gated = kind != KRASIS_CUDA_RELU_SQUARED;
            const double value = activated(kind, gated ? of(r, i) : 0, of(r, gated ? kColumns + i : i));
            const double tolerance = (out.rounding() + 4e-6) * std::fabs(value) + 2e-6;
            CHECK(std::fabs(out.get(r * kOutStride + i) - value) <= tolerance);
        }
        CHECK(std::isnan(out.get(r * kOutStride + kColumns)));
    }
    auto wrong = args;
    wrong.kind = 6;
    CHECK(krasis_cuda_gated_activation(&wrong, nullptr) == KRASIS_ERR_ARGUMENT);
    wrong = args;
    wrong.x_stride = static_cast<int64_t>(width) - 8;
    CHECK(krasis_cuda_gated_activation(&wrong, nullptr) == KRASIS_ERR_SHAPE);
}

void check_add_rows(int32_t dtype, bool with_x, bool with_gates, bool with_bias) {
    constexpr size_t kRows = 3, kColumns = 776;
    Random random(static_cast<uint64_t>(dtype));
    Matrix x(kRows * kColumns, dtype);
    Array<float> hidden(kRows * kColumns + 1), before(kRows * kColumns), gates(kRows), bias(kColumns);
    hidden.poison();
    for (size_t i = 0; i < kRows * kColumns; ++i) {
        x.set(i, random.normal());
        hidden[i] = before[i] = random.normal();
    }
    for (size_t i = 0; i < kColumns; ++i) bias[i] = random.normal();
    for (size_t r = 0; r < kRows; ++r) gates[r] = 2 * random.normal();
    krasis_cuda_add_rows_args args{};
    args.hidden = hidden.upload();
    args.x = with_x ? x.bytes.upload() : nullptr;
    args.gates = with_gates ? gates.upload() : nullptr;
    args.bias = with_bias ? bias.upload() : nullptr;
    args.tokens = kRows;
    args.n = kColumns;
    args.x_dtype = dtype;
    CHECK_OK(krasis_cuda_add_rows(&args, nullptr));
    hidden.download();
    for (size_t i = 0; i < kRows * kColumns; ++i) {
        const double added = (with_x ? x.get(i) : 0) + (with_bias ? bias[i % kColumns] : 0);
        const double value = before[i] + added * (with_gates ? sigmoid(gates[i / kColumns]) : 1);
        CHECK(std::fabs(hidden[i] - value) <= 1e-6 * (std::fabs(value) + std::fabs(added) + 1));
    }
    CHECK(std::isnan(hidden[kRows * kColumns]));
    args.n = kColumns - 4;
    CHECK(krasis_cuda_add_rows(&args, nullptr) == KRASIS_ERR_SHAPE);
}

}  // namespace

void run_activation() {
    for (int32_t kind = KRASIS_CUDA_SILU; kind <= KRASIS_CUDA_RELU_SQUARED; ++kind) {
        for (int32_t dtype : kDtypes) check_activation(kind, dtype, dtype == KRASIS_F32);
    }
    check_add_rows(KRASIS_BF16, true, true, false);
    check_add_rows(KRASIS_F32, true, false, true);
    check_add_rows(KRASIS_F16, true, true, true);
    check_add_rows(KRASIS_F32, false, false, true);
}

}  // namespace test
