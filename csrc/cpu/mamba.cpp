// mamba.cpp: krasis_mamba2: checks, and its three steps on the pool.
#include "mamba.h"

#include "recurrent_steps.h"

namespace {

using namespace krasis;

constexpr int64_t kMostHeads = 1 << 16, kMostDim = 1 << 10, kMostRows = int64_t{1} << 40;

using Parts = RecurrentParts<krasis_mamba2_args>;

Parts parts_for(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        return {avx512::mamba_conv, avx512::mamba_steps, avx512::mamba_scan, avx512::mamba_norm};
    }
    return {avx2::mamba_conv, avx2::mamba_steps, avx2::mamba_scan, avx2::mamba_norm};
}

int32_t check_sizes(const krasis_mamba2_args &args) {
    if (args.tokens < 0 || args.heads <= 0 || args.head_dim <= 0 || args.state_dim <= 0 || args.groups <= 0 ||
        args.conv_width <= 0 || args.num_spans < 0 || args.matrices_offset_bytes < 0 || args.columns_offset_bytes < 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.heads > kMostHeads || args.head_dim > kMostDim || args.state_dim > kMostDim ||
        args.head_dim % kMambaTile != 0 || args.state_dim % 16 != 0 || args.heads % args.groups != 0 ||
        args.conv_width > kMaxMambaConv || args.tokens > kMostRows ||
        args.ldx < mamba_inner(args) + mamba_channels(args) || args.matrices_offset_bytes % 4 != 0 ||
        args.columns_offset_bytes % 4 != 0) {
        return KRASIS_ERR_SHAPE;
    }
    return KRASIS_OK;
}

int32_t check(const krasis_mamba2_args &args) {
    if (const int32_t status = check_sizes(args)) return status;
    if (!args.conv || !args.rates || !args.dt_bias || !args.skip || !args.gate_norm) return KRASIS_ERR_ARGUMENT;
    if (args.tokens > 0 && (!args.x || !args.steps || !args.out || !args.spans)) return KRASIS_ERR_ARGUMENT;
    return check_state_spans(args.spans, args.num_spans, args.tokens);
}

}  // namespace

int32_t krasis_mamba2(krasis_pool *pool, const krasis_mamba2_args *pointer) {
    if (!pool || !pointer) return KRASIS_ERR_ARGUMENT;
    const krasis_mamba2_args &args = *pointer;
    if (const int32_t status = check(args)) return status;
    if (args.tokens == 0) return KRASIS_OK;
    const int64_t units = (mamba_channels(args) + kMambaConvUnit - 1) / kMambaConvUnit;
    run_recurrent(pool, args, parts_for(pool), units, args.heads, args.head_dim / kMambaTile);
    return KRASIS_OK;
}
