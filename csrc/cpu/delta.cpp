// delta.cpp: krasis_gated_delta: checks, and its three steps on the pool.
#include "delta.h"

#include "recurrent_steps.h"

namespace {

using namespace krasis;

constexpr int64_t kMostHeads = 1 << 16, kMostRows = int64_t{1} << 40;

using Parts = RecurrentParts<krasis_gated_delta_args>;

Parts parts_for(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        return {avx512::delta_conv, avx512::delta_gates, avx512::delta_scan, avx512::delta_norm};
    }
    return {avx2::delta_conv, avx2::delta_gates, avx2::delta_scan, avx2::delta_norm};
}

int32_t check_sizes(const krasis_gated_delta_args &args) {
    if (args.tokens < 0 || args.key_heads <= 0 || args.value_heads <= 0 || args.key_dim <= 0 || args.value_dim <= 0 ||
        args.conv_width <= 0 || args.num_spans < 0 || args.matrices_offset_bytes < 0 || args.columns_offset_bytes < 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.gate != KRASIS_GATE_SILU && args.gate != KRASIS_GATE_SIGMOID) return KRASIS_ERR_ARGUMENT;
    if (args.key_dim % 16 != 0 || args.value_dim % kDeltaTile != 0 || args.key_dim > kMaxDeltaDim ||
        args.value_dim > kMaxDeltaDim || args.conv_width > kMaxConvWidth || args.key_heads > kMostHeads ||
        args.value_heads > kMostHeads || args.value_heads % args.key_heads != 0 || args.tokens > kMostRows ||
        args.ldx < delta_channels(args) + (args.z ? 0 : args.value_heads * args.value_dim) ||
        args.matrices_offset_bytes % 4 != 0 || args.columns_offset_bytes % 4 != 0) {
        return KRASIS_ERR_SHAPE;
    }
    return KRASIS_OK;
}

int32_t check(const krasis_gated_delta_args &args) {
    if (const int32_t status = check_sizes(args)) return status;
    if (!args.conv || !args.rates || !args.dt_bias || !args.gate_norm) return KRASIS_ERR_ARGUMENT;
    if (args.tokens > 0 && (!args.x || !args.gates || !args.out || !args.spans)) return KRASIS_ERR_ARGUMENT;
    return check_state_spans(args.spans, args.num_spans, args.tokens);
}

}  // namespace

int32_t krasis_gated_delta(krasis_pool *pool, const krasis_gated_delta_args *pointer) {
    if (!pool || !pointer) return KRASIS_ERR_ARGUMENT;
    const krasis_gated_delta_args &args = *pointer;
    if (const int32_t status = check(args)) return status;
    if (args.tokens == 0) return KRASIS_OK;
    run_recurrent(pool, args, parts_for(pool), delta_conv_units(args), args.value_heads, args.value_dim / kDeltaTile);
    return KRASIS_OK;
}
