// latent_products.cu: a product of int8 rows for each head, as latent attention takes queries to the latents and what
// it gathers of them to values: the kernels of int8_rows.cuh, all heads in one launch.
#include "int8_rows.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

constexpr int64_t kVectorTokens = 2;  // as in int8_rows.cu

struct HeadsParams {
    Int8Params first;                        // of the first head
    int64_t x_head_bytes, out_head_bytes;    // between heads
    int64_t weight_head_bytes, scales_head;  // scales: elements
    int32_t blocks_per_head;
};

KRASIS_DEVICE Int8Params params_of(const HeadsParams &p, int64_t head) {
    Int8Params own = p.first;
    own.x += head * p.x_head_bytes;
    own.out += head * p.out_head_bytes;
    own.weight += head * p.weight_head_bytes;
    own.scales += head * p.scales_head;
    return own;
}

// Blocks: [head][strip].
template <class Type, int kTokens, int kWarps>
KRASIS_KERNEL(32 * kWarps, 1)
int8_heads_vector_kernel(const HeadsParams p) {
    const unsigned each = static_cast<unsigned>(p.blocks_per_head);
    int8_gemv<Type, kTokens, kWarps>(params_of(p, simt::block_x() / each), static_cast<int>(simt::block_x() % each));
}

// Blocks: [head][rows][columns].
template <class Type, int kWarpsM, int kTilesM, int kStrips, int kStages>
KRASIS_KERNEL(128 * kWarpsM, 1)
int8_heads_matrix_kernel(const HeadsParams p) {
    const unsigned each = static_cast<unsigned>(p.blocks_per_head), block = simt::block_x() % each;
    const Int8Params own = params_of(p, simt::block_x() / each);
    const unsigned columns = static_cast<unsigned>(own.column_blocks);
    Int8Worker<Int8Tile<Type, kWarpsM, kTilesM, kStrips, kStages>> worker(own, block / columns,
                                                                          static_cast<int>(block % columns));
    worker.run();
    worker.store();
}

int32_t check(const krasis_cuda_int8_heads_args &a) {
    const bool counts = a.tokens >= 0 && a.num_heads > 0 && a.k > 0 && a.n > 0 && a.k <= INT32_MAX && a.n <= INT32_MAX;
    if (!a.x || !a.weight || !a.scales || !a.out || !counts || !is_16_bit(a.dtype)) return KRASIS_ERR_ARGUMENT;
    const bool sizes = a.k % 64 == 0 && a.n % 32 == 0;
    const bool strides = a.x_stride % 8 == 0 && a.x_head_stride % 8 == 0 && a.out_stride % 8 == 0 &&
                         a.out_head_stride % 8 == 0 && a.x_head_stride >= a.k && a.out_head_stride >= a.n;
    const bool aligned = is_aligned(a.x) && is_aligned(a.weight) && is_aligned(a.out);
    return sizes && strides && aligned ? KRASIS_OK : KRASIS_ERR_SHAPE;
}

template <class Type, int kTokens>
int32_t launch_vector(HeadsParams params, int64_t num_heads, void *stream) {
    constexpr int kWarps = 4;
    params.blocks_per_head = params.first.strips;
    if (num_heads > kMaxBlocks / params.blocks_per_head) return KRASIS_ERR_ARGUMENT;
    const simt::LaunchShape shape{static_cast<unsigned>(num_heads * params.blocks_per_head), 32 * kWarps,
                                  kWarps * kTokens * 32 * sizeof(float)};
    return launch<int8_heads_vector_kernel<Type, kTokens, kWarps>>(shape, params, stream);
}

template <class Type, int kWarpsM, int kTilesM, int kStages>
int32_t launch_matrix(HeadsParams params, int64_t num_heads, void *stream) {
    using Tile = Int8Tile<Type, kWarpsM, kTilesM, 1, kStages>;
    params.first.column_blocks = static_cast<int32_t>(ceil_div(params.first.strips, Tile::kBlockStrips));
    const int64_t blocks = ceil_div(params.first.tokens, Tile::kRows) * params.first.column_blocks;
    if (blocks > kMaxBlocks / num_heads) return KRASIS_ERR_ARGUMENT;
    params.blocks_per_head = static_cast<int32_t>(blocks);
    const simt::LaunchShape shape{static_cast<unsigned>(num_heads * blocks), Tile::kThreads, Tile::kSharedBytes};
    return launch<int8_heads_matrix_kernel<Type, kWarpsM, kTilesM, 1, kStages>>(shape, params, stream);
}

template <class Type>
int32_t launch_type(const HeadsParams &params, int64_t num_heads, void *stream) {
    const int64_t tokens = params.first.tokens;
    if (tokens == 1) return launch_vector<Type, 1>(params, num_heads, stream);
    if (tokens <= kVectorTokens) return launch_vector<Type, kVectorTokens>(params, num_heads, stream);
    if (tokens <= 16) return launch_matrix<Type, 1, 1, 4>(params, num_heads, stream);
    return launch_matrix<Type, 1, 4, 4>(params, num_heads, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_int8_heads(const krasis_cuda_int8_heads_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const krasis_cuda_int8_heads_args &a = *args;
    const int32_t status = check(a);
    if (status != KRASIS_OK || a.tokens == 0) return status;
    HeadsParams p{};
    p.first.x = static_cast<const uint8_t *>(a.x);
    p.first.weight = reinterpret_cast<const uint8_t *>(a.weight);
    p.first.scales = a.scales;
    p.first.out = static_cast<uint8_t *>(a.out);
    p.first.x_stride_bytes = a.x_stride * 2;
    p.first.out_stride = a.out_stride;
    p.first.tokens = a.tokens;
    p.first.k = static_cast<int32_t>(a.k);
    p.first.strips = static_cast<int32_t>(a.n / 32);
    p.x_head_bytes = a.x_head_stride * 2;
    p.out_head_bytes = a.out_head_stride * 2;
    p.weight_head_bytes = a.n * a.k;
    p.scales_head = a.n;
    return a.dtype == KRASIS_BF16 ? launch_type<krasis::Bf16>(p, a.num_heads, stream)
                                  : launch_type<krasis::F16>(p, a.num_heads, stream);
}
