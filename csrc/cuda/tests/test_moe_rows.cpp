// test_moe_rows.cpp: the weighted sum of slots against float64.
#include <cmath>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

void check_reduce(int32_t slots_dtype, int32_t out_dtype, int64_t top_k, bool with_residual) {
    Random random(12);
    constexpr int64_t kTokens = 7, kColumns = 2072;
    constexpr int32_t kExperts = 16;
    const auto num_slots = static_cast<size_t>(kTokens * top_k), columns = static_cast<size_t>(kColumns);
    Matrix slots(num_slots * columns, slots_dtype), out(kTokens * columns, out_dtype),
        residual(kTokens * columns, out_dtype);
    Array<int32_t> ids(num_slots);
    Array<float> weights(num_slots);
    for (size_t s = 0; s < num_slots; ++s) {
        ids[s] = random.below(4) ? static_cast<int32_t>(random.below(kExperts)) : random.below(2) ? -1 : kExperts;
        weights[s] = random.normal();
        // Rows of slots without an expert stay NaN: nothing may read them.
        if (ids[s] < 0 || ids[s] >= kExperts) continue;
        for (size_t c = 0; c < columns; ++c) slots.set(s * columns + c, random.normal());
    }
    for (size_t i = 0; i < kTokens * columns; ++i) residual.set(i, random.normal());
    krasis_cuda_moe_reduce_args args{};
    args.slots = slots.bytes.upload();
    args.slots_dtype = slots_dtype;
    args.out_dtype = out_dtype;
    args.ids = ids.upload();
    args.weights = weights.upload();
    args.residual = with_residual ? residual.bytes.upload() : nullptr;
    args.out = out.bytes.upload();
    args.tokens = kTokens;
    args.top_k = top_k;
    args.n = kColumns;
    args.num_experts = kExperts;
    CHECK_OK(krasis_cuda_moe_reduce(&args, nullptr));
    out.bytes.download();
    for (size_t t = 0; t < kTokens; ++t) {
        for (size_t c = 0; c < columns; ++c) {
            double value = with_residual ? residual.get(t * columns + c) : 0, size = std::fabs(value);
            for (size_t s = t * static_cast<size_t>(top_k); s < (t + 1) * static_cast<size_t>(top_k); ++s) {
                if (ids[s] < 0 || ids[s] >= kExperts) continue;
                const double term = weights[s] * slots.get(s * columns + c);
                value += term;
                size += std::fabs(term);
            }
            const double error = std::fabs(out.get(t * columns + c) - value);
            CHECK(error <= out.rounding() * std::fabs(value) + 1e-6 * size + 0x1p-24);
        }
    }
    args.residual = args.out;  // in place
    CHECK_OK(krasis_cuda_moe_reduce(&args, nullptr));
    args.n = 2068;
    CHECK(krasis_cuda_moe_reduce(&args, nullptr) == KRASIS_ERR_SHAPE);
}

}  // namespace

void run_moe_rows() {
    for (int32_t slots : kDtypes) {
        for (int32_t out : kDtypes) check_reduce(slots, out, slots == KRASIS_F16 ? 1 : 8, slots != out);
    }
}

}  // namespace test
