// rope.cpp: krasis_qk_norm_rope_store.
#include "rope.h"

#include "rows.h"
#include "spans.h"

namespace {

int32_t check(const krasis_qkv_args &args) {
    if (args.tokens < 0 || args.num_heads <= 0 || args.num_kv_heads <= 0 || args.head_dim <= 0 ||
        args.rotary_dims < 0 || args.norm < KRASIS_QK_NORM_NONE || args.norm > KRASIS_QK_NORM_HEAD_AFTER ||
        (args.rope_style != KRASIS_ROPE_HALF && args.rope_style != KRASIS_ROPE_INTERLEAVED) || !(args.clip >= 0.0f)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.head_dim % 16 != 0 || args.head_dim > krasis::kMaxHeadDim || args.num_heads % args.num_kv_heads != 0 ||
        args.rotary_dims % 2 != 0 || args.rotary_dims > args.head_dim) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.norm != KRASIS_QK_NORM_NONE && (!args.q_norm || !args.k_norm)) return KRASIS_ERR_ARGUMENT;
    const bool rotates = args.rotary_dims > 0;
    const int32_t status = krasis::check_spans(args, rotates ? args.max_positions : INT64_MAX);
    if (status != KRASIS_OK) return status;
    if (args.tokens > 0 && (!args.qkv || (rotates && (!args.cos || !args.sin)))) return KRASIS_ERR_ARGUMENT;
    return KRASIS_OK;
}

}  // namespace

int32_t krasis_qk_norm_rope_store(krasis_pool *pool, const krasis_qkv_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const auto store = krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::rope_store_rows
                                                                       : krasis::avx2::rope_store_rows;
    krasis::parallel_rows(pool, args->tokens, krasis::qkv_size(*args), [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < args->num_spans; ++i) {
            const krasis_span &span = args->spans[i];
            const int64_t first = span.first_row > begin ? span.first_row : begin;
            const int64_t last = span.first_row + span.rows < end ? span.first_row + span.rows : end;
            if (span.rows > 0 && first < last) store(*args, span, first, last);
        }
    });
    return KRASIS_OK;
}
