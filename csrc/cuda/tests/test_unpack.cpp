// test_unpack.cpp: INT8 weights unpacked to 16-bit matrices, bit for bit.
#include <vector>

#include "krasis_cuda.h"
#include "matrix.h"
#include "suites.h"

namespace test {
namespace {

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

}  // namespace

void run_unpack() {
    check_int8(96, 320, KRASIS_BF16);
    check_int8(32, 64, KRASIS_F16);
    check_int8(64, 512, KRASIS_BF16);
}

}  // namespace test
