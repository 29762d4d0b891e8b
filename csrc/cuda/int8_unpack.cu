// int8_unpack.cu: int8 rows [n/32, k/4, 32, 4] as a 16-bit matrix [n, k], for a library's matrix products.
//
// A warp turns 64 k of a strip of 32 rows into 32 rows of 128 bytes, put together in shared memory: a lane reads 16
// bytes, four k of four rows, and writes eight bytes a row; chunks are swizzled by four rows, so that no two lanes of
// an access meet in a bank.
#include "int8_dequant.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStripRows = 32, kWarpK = 64, kBlockK = kWarps * kWarpK;
constexpr int kRowBytes = 2 * kWarpK, kWarpBytes = kStripRows * kRowBytes;

struct UnpackParams {
    const int8_t *weight;
    const float *scales;
    int64_t k;
    uint8_t *out;
    int32_t k_blocks;
};

KRASIS_DEVICE int place(int row, int chunk) { return row * kRowBytes + (chunk ^ row / 4) * 16; }

// Blocks: [strip][k block]. shared: [warp][row][k].
template <class Type>
KRASIS_KERNEL(kThreads, 8)
int8_unpack_kernel(const UnpackParams p) {
    const unsigned k_blocks = static_cast<unsigned>(p.k_blocks);
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t strip = simt::block_x() / k_blocks;
    const int64_t k = static_cast<int64_t>(simt::block_x() % k_blocks) * kBlockK + warp * kWarpK;
    uint8_t *rows = simt::shared_memory() + warp * kWarpBytes;
    if (k < p.k) {
        const int j = lane % 8;  // rows 4j..4j+3
        const int8_t *from = p.weight + (strip * p.k + k) * kStripRows + lane * 16;
        simt::Words4 codes[4];
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) codes[i] = reinterpret_cast<const simt::Words4 *>(from)[32 * i];
        const auto scales = reinterpret_cast<const simt::Words4 *>(p.scales + strip * kStripRows)[j];
        KRASIS_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int k4 = 4 * i + lane / 8;
            KRASIS_UNROLL
            for (int r = 0; r < 4; ++r) {
                const float scale = bits_float(scales.w[r]);
                float values[4];
                int8_to_floats(codes[i].w[r], values);
                const simt::Words2 words{{pack2<Type>(values[0] * scale, values[1] * scale),
                                          pack2<Type>(values[2] * scale, values[3] * scale)}};
                simt::shared_store(rows + place(4 * j + r, k4 / 2) + k4 % 2 * 8, words);
            }
        }
    }
    simt::sync_threads();
    if (k >= p.k) return;
    uint8_t *to = p.out + (strip * kStripRows * p.k + k) * 2;
    KRASIS_UNROLL
    for (int i = 0; i < kStripRows; i += 4) {
        const int row = i + lane / 8, chunk = lane % 8;
        *reinterpret_cast<simt::Words4 *>(to + row * p.k * 2 + chunk * 16) =
            simt::shared_load<simt::Words4>(rows + place(row, chunk));
    }
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_int8_dequant(const int8_t *weight, const float *scales, int64_t n, int64_t k, int32_t dtype,
                                 void *out, void *stream) {
    using namespace krasis::cuda;
    const bool counts = n > 0 && k > 0 && n <= INT32_MAX && k <= INT32_MAX;
    if (!weight || !scales || !out || !counts || !is_16_bit(dtype)) return KRASIS_ERR_ARGUMENT;
    const bool aligned = is_aligned(weight) && is_aligned(scales) && is_aligned(out);
    if (k % 64 || n % kStripRows || !aligned) return KRASIS_ERR_SHAPE;
    const UnpackParams p{weight, scales, k, static_cast<uint8_t *>(out), static_cast<int32_t>(ceil_div(k, kBlockK))};
    const int64_t blocks = n / kStripRows * p.k_blocks;
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(blocks), kThreads, kWarps * kWarpBytes};
    return dtype == KRASIS_BF16 ? launch<int8_unpack_kernel<krasis::Bf16>>(shape, p, stream)
                                : launch<int8_unpack_kernel<krasis::F16>>(shape, p, stream);
}
