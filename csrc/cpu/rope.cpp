// rope.cpp: krasis_qk_norm_rope_store.
#include "rope.h"

#include "rows.h"

namespace {

int32_t check(const krasis_qkv_args &args) {
    if (args.tokens < 0 || args.start < 0 || args.num_heads <= 0 || args.num_kv_heads <= 0 || args.head_dim <= 0 ||
        (args.kv_dtype != KRASIS_F32 && args.kv_dtype != KRASIS_F16)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.head_dim % 16 != 0 || args.head_dim > krasis::kMaxHeadDim || args.num_heads % args.num_kv_heads != 0) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.tokens > args.capacity || args.start > args.capacity - args.tokens || args.tokens > args.max_positions ||
        args.start > args.max_positions - args.tokens) {
        return KRASIS_ERR_RANGE;
    }
    if (args.tokens > 0 && (!args.qkv || !args.cos || !args.sin || !args.k_cache || !args.v_cache)) {
        return KRASIS_ERR_ARGUMENT;
    }
    return KRASIS_OK;
}

}  // namespace

int32_t krasis_qk_norm_rope_store(krasis_pool *pool, const krasis_qkv_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const auto store = krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::rope_store_tokens
                                                                       : krasis::avx2::rope_store_tokens;
    const int64_t row = (args->num_heads + 2 * args->num_kv_heads) * args->head_dim;
    krasis::parallel_rows(pool, args->tokens, row, [&](int64_t begin, int64_t end) { store(*args, begin, end); });
    return KRASIS_OK;
}
