// marlin_moe.cu: checks, choice of tile and launch of the grouped product.
#include <algorithm>

#include "marlin_few.cuh"
#include "marlin_moe.cuh"
#include "marlin_wgmma.cuh"
#include "status.h"

namespace krasis::cuda {
namespace {

// Up to so many slots (eight tokens of eight choices), for which the other kernels have too few blocks.
constexpr int64_t kFewSlots = 64;

bool is_few(const krasis_cuda_moe_gemm_args &a) { return a.m_block == kFewRows && a.num_slots <= kFewSlots; }

int32_t check_ids(const krasis_cuda_moe_gemm_args &a) {
    if (a.hidden && !a.ids) return KRASIS_ERR_ARGUMENT;
    if (a.ids == nullptr) return KRASIS_OK;
    if (!is_few(a)) return KRASIS_ERR_SHAPE;
    if (a.hidden == nullptr) return KRASIS_OK;
    const bool sums = a.slot_weights && a.arrivals && a.top_k > 0 && a.num_slots % a.top_k == 0;
    return sums && !a.gated && a.activation == KRASIS_CUDA_SILU && is_16_bit(a.out_dtype) ? KRASIS_OK
                                                                                          : KRASIS_ERR_ARGUMENT;
}

int32_t check(const krasis_cuda_moe_gemm_args &a) {
    const bool routing = a.ids || (a.sorted_slots && a.block_experts && a.first_block);
    const bool pointers = a.activations && a.expert_base && routing && a.out;
    const bool counts = a.num_slots >= 0 && a.num_slots <= INT32_MAX && a.slots_per_row > 0 &&
                        a.slots_per_row <= INT32_MAX && a.k > 0 && a.n > 0 && a.max_blocks_launched >= 0 &&
                        a.codes_offset >= 0 && a.scales_offset >= 0;
    const bool is_e2m1 = a.scale_dtype == KRASIS_CUDA_E8M0;
    const bool kinds = is_16_bit(a.dtype) && (is_e2m1 || is_16_bit(a.scale_dtype)) &&
                       (a.out_dtype == a.dtype || a.out_dtype == KRASIS_F32);
    MoeActivation activation;
    const bool biases = (a.up_bias != nullptr) == (a.bias != nullptr && a.gated);
    if (!pointers || !counts || !kinds || !biases || !moe_activation(a, activation)) return KRASIS_ERR_ARGUMENT;
    if (a.expert_begin < 0 || a.expert_begin > a.expert_end || a.expert_end > a.num_experts) return KRASIS_ERR_RANGE;
    const bool block = a.m_block == 16 || a.m_block == 32 || a.m_block == 64 || a.m_block == 128;
    const bool any_group = a.group == 64 || a.group == 128 || a.group == a.k;
    const bool group = a.group == 32 || (any_group && a.scale_dtype != KRASIS_CUDA_E8M0);
    const int64_t out_columns = a.gated ? a.n / 2 : a.n;
    const bool sizes = a.k % 64 == 0 && a.n % (a.gated ? 128 : 64) == 0 && a.k <= INT32_MAX && a.n <= INT32_MAX;
    if (!block || !group || !sizes || a.k % a.group) return KRASIS_ERR_SHAPE;
    if (a.activation_stride < a.k || a.activation_stride % 8) return KRASIS_ERR_SHAPE;
    // Kernels count 16 bytes at a time, in 32 bits.
    if (ceil_div(a.num_slots, a.slots_per_row) > INT32_MAX / (a.activation_stride / 8)) return KRASIS_ERR_RANGE;
    if (is_few(a) && a.k > INT32_MAX / (a.n / 2)) return KRASIS_ERR_RANGE;
    if (a.out_stride < out_columns || a.out_stride % 8) return KRASIS_ERR_SHAPE;
    const bool aligned =
        is_aligned(a.activations) && is_aligned(a.out) && a.codes_offset % 16 == 0 && a.scales_offset % 16 == 0;
    return aligned ? check_ids(a) : KRASIS_ERR_SHAPE;
}

int32_t group_shift(const krasis_cuda_moe_gemm_args &a) {
    if (a.group == a.k) return 0;  // stored as one scale a channel, whatever the group is called
    return a.group == 32 ? 1 : a.group == 64 ? 2 : 3;
}

MoeGemmParams parameters(const krasis_cuda_moe_gemm_args &a) {
    MoeGemmParams p{};
    p.activations = static_cast<const uint8_t *>(a.activations);
    p.activation_stride_chunks = static_cast<int32_t>(a.activation_stride / 8);
    p.expert_base = a.expert_base;
    p.codes_offset = a.codes_offset;
    p.scales_offset = a.scales_offset;
    p.sorted_slots = a.sorted_slots;
    p.block_experts = a.block_experts;
    p.first_block = a.first_block;
    p.out = static_cast<uint8_t *>(a.out);
    p.out_stride = a.out_stride;
    p.num_executed = reinterpret_cast<unsigned long long *>(a.num_executed);
    p.slots_per_row = static_cast<int32_t>(a.slots_per_row);
    p.expert_begin = a.expert_begin;
    p.expert_end = a.expert_end;
    p.k_steps = static_cast<int32_t>(a.k / 64);
    p.column_tiles = static_cast<int32_t>(a.n / 64);
    p.group_shift = group_shift(a);
    p.gate_tiles = a.gated ? p.column_tiles / 2 : 0;
    p.column_blocks = (p.column_tiles + 3) / 4;
    p.scale_is_bf16 = a.scale_dtype == KRASIS_BF16;
    p.out_is_float = a.out_dtype == KRASIS_F32;
    p.bias = a.bias;
    p.up_bias = a.up_bias;
    p.is_silu = a.activation == KRASIS_CUDA_SILU;
    p.is_relu_squared = a.activation == KRASIS_CUDA_RELU_SQUARED;
    moe_activation(a, p.activation);
    p.ids = a.ids;
    p.slot_weights = a.slot_weights;
    p.hidden = a.hidden;
    p.arrivals = a.arrivals;
    p.top_k = static_cast<int32_t>(a.top_k);
    return p;
}

// tiles: as many as there can be; only the device knows how many there are.
template <auto kKernel, class Tile>
int32_t launch_tile(const MoeGemmParams &params, int64_t tiles, void *stream) {
    simt::LaunchShape shape{0, Tile::kThreads, Tile::kSharedBytes};
    const char *error = nullptr;
    const int64_t resident = simt::resident_blocks<kKernel>(shape, &error);
    if (resident == 0) return report_cuda_error(error);
    shape.blocks = static_cast<unsigned>(std::min(tiles, resident));
    return launch<kKernel>(shape, params, stream);
}

template <class Type, class Codes, int kRows>
int32_t launch_mma(const MoeGemmParams &params, int64_t tiles, void *stream) {
    return launch_tile<moe_mma_kernel<Type, Codes, kRows>, MmaTile<Type, Codes, kRows>>(params, tiles, stream);
}

template <class Type, class Codes, bool kGated>
int32_t launch_few(MoeGemmParams params, const krasis_cuda_moe_gemm_args &a, void *stream) {
    using Worker = FewWorker<Type, Codes, kGated>;
    params.column_blocks = kGated ? params.gate_tiles : params.column_tiles;
    int64_t tiles = a.num_slots * params.column_blocks;
    if (a.ids == nullptr) {
        const int64_t experts = a.expert_end - a.expert_begin;
        tiles = krasis_cuda_align_max_blocks(a.num_slots, experts, kFewRows) * params.column_blocks;
        if (a.max_blocks_launched) tiles = std::min<int64_t>(tiles, a.max_blocks_launched);
    }
    const simt::LaunchShape shape{static_cast<unsigned>(tiles), Worker::kThreads, Worker::kSharedBytes};
    return launch_beside<moe_few_kernel<Type, Codes, kGated>>(shape, params, stream);
}

template <class Type, class Codes>
int32_t launch_many(int32_t m_block, const MoeGemmParams &params, int64_t tiles, void *stream) {
    if (m_block == 16) return launch_mma<Type, Codes, 16>(params, tiles, stream);
    if (m_block == 32) return launch_mma<Type, Codes, 32>(params, tiles, stream);
    if (m_block == 64) return launch_mma<Type, Codes, 64>(params, tiles, stream);
    if (!simt::has_wgmma()) return launch_mma<Type, Codes, 128>(params, tiles, stream);
    return launch_tile<moe_wgmma_kernel<Type, Codes>, WgmmaTile<Type, Codes>>(params, tiles, stream);
}

template <class Type, class Codes>
int32_t launch_type(const MoeGemmParams &params, const krasis_cuda_moe_gemm_args &a, void *stream) {
    if (is_few(a)) {
        return a.gated ? launch_few<Type, Codes, true>(params, a, stream)
                       : launch_few<Type, Codes, false>(params, a, stream);
    }
    const int64_t row_blocks = krasis_cuda_align_max_blocks(a.num_slots, a.expert_end - a.expert_begin, a.m_block);
    int64_t tiles = row_blocks * params.column_blocks;
    if (a.max_blocks_launched) tiles = std::min<int64_t>(tiles, a.max_blocks_launched);
    return launch_many<Type, Codes>(a.m_block, params, tiles, stream);
}

template <class Codes>
int32_t launch_codes(const krasis_cuda_moe_gemm_args &a, void *stream) {
    const MoeGemmParams params = parameters(a);
    return a.dtype == KRASIS_BF16 ? launch_type<krasis::Bf16, Codes>(params, a, stream)
                                  : launch_type<krasis::F16, Codes>(params, a, stream);
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_moe_gemm(const krasis_cuda_moe_gemm_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const int32_t status = check(*args);
    if (status != KRASIS_OK || args->num_slots == 0) return status;
    return args->scale_dtype == KRASIS_CUDA_E8M0 ? launch_codes<E2m1Codes>(*args, stream)
                                                 : launch_codes<BiasedCodes>(*args, stream);
}
