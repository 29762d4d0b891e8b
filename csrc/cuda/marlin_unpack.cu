// marlin_unpack.cu: Marlin experts as 16-bit matrices [n, k], for a library's matrix products.
//
// A warp turns four tiles of 16 x 64 codes, 64 k of 64 columns, into 64 rows of 128 bytes. Its lanes hold pieces of
// four bytes that belong to different rows, so rows are put together in shared memory, chunks swizzled by row: then
// both the pieces going in and the chunks coming out fall into different banks.
#include "marlin_dequant.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 64, kWarpK = 64, kBlockK = kWarps * kWarpK;
constexpr int kTileBytes = 512, kRowBytes = 2 * kWarpK, kWarpBytes = kColumns * kRowBytes;

struct UnpackParams {
    const void *const *expert_base;
    int64_t codes_offset, scales_offset, k, n;
    uint8_t *out;
    int32_t expert_begin, column_tiles, k_blocks;
    int32_t group;  // 0: one scale a channel
    bool scale_is_bf16;
};

KRASIS_DEVICE float scale_value(const UnpackParams &p, uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    return p.scale_is_bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// Scales of columns c = 8i + lane / 4 of a tile, in the order of i.
KRASIS_DEVICE void load_scales(const UnpackParams &p, const uint8_t *scales, int tile, int64_t k, float (&out)[8]) {
    const int g = static_cast<int>(simt::thread_x() % 32 / 4);
    if (p.group) {  // c is at 8g + i
        const int64_t row = k / p.group * p.n;
        const simt::Words4 words = *reinterpret_cast<const simt::Words4 *>(scales + (row + tile * 64 + 8 * g) * 2);
        KRASIS_UNROLL
        for (int i = 0; i < 8; ++i) out[i] = scale_value(p, words.w[i / 2], i % 2);
        return;
    }
    KRASIS_UNROLL
    for (int half = 0; half < 2; ++half) {  // c = 32 half + 8b + g is at 32 half + 8 (g / 2) + 2b + g % 2
        const int64_t at = tile * 64 + 32 * half + 8 * (g / 2);
        const simt::Words4 words = *reinterpret_cast<const simt::Words4 *>(scales + at * 2);
        KRASIS_UNROLL
        for (int b = 0; b < 4; ++b) out[4 * half + b] = scale_value(p, words.w[b], g % 2);
    }
}

// Row c, chunk of eight k.
KRASIS_DEVICE int place(int column, int chunk) { return column * kRowBytes + (chunk ^ column % 8) * 16; }

// 16 x 64 codes of this lane's word quad into chunks 2 k16 and 2 k16 + 1 of the rows.
template <class Type>
KRASIS_DEVICE void unpack_tile(const simt::Words4 &codes, const float (&scales)[8], int k16, uint8_t *rows) {
    const int lane = static_cast<int>(simt::thread_x() % 32), g = lane / 4, q = lane % 4;
    KRASIS_UNROLL
    for (int j = 0; j < 4; ++j) {
        uint32_t values[2][2];
        dequantize_word<Type>(codes.w[j], values);
        KRASIS_UNROLL
        for (int h = 0; h < 2; ++h) {
            const float scale = scales[2 * j + h];
            KRASIS_UNROLL
            for (int i = 0; i < 2; ++i) {
                const uint32_t pair = values[h][i];
                const float low = Type::to_float(static_cast<uint16_t>(pair)) * scale;
                const float high = Type::to_float(static_cast<uint16_t>(pair >> 16)) * scale;
                simt::shared_store(rows + place(16 * j + 8 * h + g, 2 * k16 + i) + 4 * q, pack2<Type>(low, high));
            }
        }
    }
}

// Blocks: [expert][k block][column tile]. shared: [warp][column][k].
template <class Type>
KRASIS_KERNEL(kThreads, 4)
marlin_unpack_kernel(const UnpackParams p) {
    const unsigned tiles = static_cast<unsigned>(p.column_tiles), blocks = static_cast<unsigned>(p.k_blocks);
    const int tile = static_cast<int>(simt::block_x() % tiles);
    const int64_t expert = simt::block_x() / tiles / blocks;
    const auto *base = static_cast<const uint8_t *>(p.expert_base[p.expert_begin + expert]);
    if (base == nullptr) return;
    const int lane = static_cast<int>(simt::thread_x() % 32), warp = static_cast<int>(simt::thread_x() / 32);
    const int64_t k = static_cast<int64_t>(simt::block_x() / tiles % blocks) * kBlockK + warp * kWarpK;
    uint8_t *rows = simt::shared_memory() + warp * kWarpBytes;
    if (k < p.k) {
        simt::Words4 codes[4];
        KRASIS_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            const int64_t at = ((k / 16 + k16) * p.column_tiles + tile) * kTileBytes + lane * 16;
            codes[k16] = *reinterpret_cast<const simt::Words4 *>(base + p.codes_offset + at);
        }
        float scales[8];
        KRASIS_UNROLL
        for (int k16 = 0; k16 < 4; ++k16) {
            // A group is at least two tiles.
            if (k16 % 2 == 0) load_scales(p, base + p.scales_offset, tile, k + 16 * k16, scales);
            unpack_tile<Type>(codes[k16], scales, k16, rows);
        }
    }
    simt::sync_threads();
    if (k >= p.k) return;
    uint8_t *to = p.out + ((expert * p.n + tile * kColumns) * p.k + k) * 2;
    KRASIS_UNROLL_BY(4)
    for (int i = 0; i < kColumns; i += 4) {
        const int column = i + lane / 8, chunk = lane % 8;
        *reinterpret_cast<simt::Words4 *>(to + column * p.k * 2 + chunk * 16) =
            simt::shared_load<simt::Words4>(rows + place(column, chunk));
    }
}

int32_t check(const krasis_cuda_marlin_dequant_args &a) {
    const bool kinds = is_16_bit(a.scale_dtype) && is_16_bit(a.out_dtype);
    const bool counts = a.k > 0 && a.n > 0 && a.k <= INT32_MAX && a.n <= INT32_MAX && a.count >= 0 &&
                        a.codes_offset >= 0 && a.scales_offset >= 0;
    if (!kinds || !counts || !a.expert_base || (a.count > 0 && !a.out)) return KRASIS_ERR_ARGUMENT;
    if (a.expert_begin < 0) return KRASIS_ERR_RANGE;
    const bool group = a.group == 32 || a.group == 64 || a.group == 128 || a.group == a.k;
    if (!group || a.k % 64 || a.n % 64 || a.k % a.group) return KRASIS_ERR_SHAPE;
    const bool aligned = is_aligned(a.out) && a.codes_offset % 16 == 0 && a.scales_offset % 16 == 0;
    return aligned ? KRASIS_OK : KRASIS_ERR_SHAPE;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_marlin_dequant(const krasis_cuda_marlin_dequant_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_marlin_dequant_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK) return status;
    UnpackParams p{};
    p.expert_base = a.expert_base;
    p.codes_offset = a.codes_offset;
    p.scales_offset = a.scales_offset;
    p.k = a.k;
    p.n = a.n;
    p.out = static_cast<uint8_t *>(a.out);
    p.expert_begin = a.expert_begin;
    p.column_tiles = static_cast<int32_t>(a.n / kColumns);
    p.k_blocks = static_cast<int32_t>(ceil_div(a.k, kBlockK));
    p.group = a.group == a.k ? 0 : static_cast<int32_t>(a.group);
    p.scale_is_bf16 = a.scale_dtype == KRASIS_BF16;
    const int64_t blocks = int64_t{a.count} * p.k_blocks * p.column_tiles;
    if (blocks > kMaxBlocks) return KRASIS_ERR_ARGUMENT;
    const krasis::simt::LaunchShape shape{static_cast<unsigned>(blocks), kThreads, kWarps * kWarpBytes};
    return a.out_dtype == KRASIS_BF16 ? launch<marlin_unpack_kernel<krasis::Bf16>>(shape, p, stream)
                                      : launch<marlin_unpack_kernel<krasis::F16>>(shape, p, stream);
}
