// latent.cpp: krasis_latent_store.
#include "latent.h"

#include "acts.h"
#include "rows.h"
#include "spans.h"

namespace {

constexpr int64_t kMostChannels = 1 << 20;  // keeps sizes far from overflow

bool is_size(int64_t value) { return value > 0 && value <= kMostChannels; }

int32_t check(const krasis_latent_args &args) {
    if (args.tokens < 0 || !is_size(args.num_heads) || !is_size(args.nope_dim) || !is_size(args.kv_rank) ||
        args.rope_dim < 0 || args.rope_dim > kMostChannels || args.rotary_dims < 0 ||
        (args.rope_style != KRASIS_ROPE_HALF && args.rope_style != KRASIS_ROPE_INTERLEAVED) ||
        !(args.temperature_scale >= 0.0f) || (args.temperature_scale > 0.0f && args.temperature_period <= 0) ||
        args.temperature_shift < 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.nope_dim % KRASIS_BLOCK_K != 0 || args.kv_rank % 16 != 0 || args.rope_dim % 16 != 0 ||
        (args.rotary_dims != 0 && args.rotary_dims != args.rope_dim) ||
        args.ldq < args.num_heads * (args.nope_dim + args.rope_dim) || args.ldkv < args.kv_rank + args.rope_dim) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.kv_dtype == KRASIS_I8 && args.kv_rank + args.rope_dim > krasis::kMaxLatentBytes) return KRASIS_ERR_SHAPE;
    if (const int32_t status = krasis::check_acts(args.acts)) return status;
    if (args.acts->k != args.nope_dim || args.acts->tokens != args.tokens * args.num_heads) return KRASIS_ERR_SHAPE;
    const bool rotates = args.rotary_dims > 0;
    if (const int32_t status = krasis::check_spans(args, rotates ? args.max_positions : INT64_MAX)) return status;
    if (args.tokens > 0 &&
        (!args.q || !args.kv || !args.norm || !args.queries || (rotates && (!args.cos || !args.sin)))) {
        return KRASIS_ERR_ARGUMENT;
    }
    return KRASIS_OK;
}

}  // namespace

int32_t krasis_latent_store(krasis_pool *pool, const krasis_latent_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const auto store =
        krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::latent_rows : krasis::avx2::latent_rows;
    krasis::parallel_rows(pool, args->tokens, args->ldq + args->ldkv, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < args->num_spans; ++i) {
            const krasis_span &span = args->spans[i];
            const int64_t first = span.first_row > begin ? span.first_row : begin;
            const int64_t last = span.first_row + span.rows < end ? span.first_row + span.rows : end;
            if (span.rows > 0 && first < last) store(*args, span, first, last);
        }
    });
    return KRASIS_OK;
}
