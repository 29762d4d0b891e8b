// activation.cpp: krasis_gated_activation, krasis_add_rows and krasis_gate_rows.
#include "activation.h"

#include "acts.h"
#include "rows.h"

namespace {

bool is_wide(const krasis_pool *pool) { return krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI; }

int32_t check(const krasis_activation_args &args) {
    if (args.tokens < 0 || args.intermediate <= 0 || (!args.out && !args.acts)) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = krasis::check_activation(args.kind, args.limit, args.alpha)) return status;
    if (args.intermediate % 16 != 0) return KRASIS_ERR_SHAPE;
    if (args.acts) {
        if (const int32_t status = krasis::check_acts(args.acts)) return status;
        if (args.acts->tokens != args.tokens || args.acts->k != args.intermediate) return KRASIS_ERR_SHAPE;
    }
    return args.tokens > 0 && !args.x ? KRASIS_ERR_ARGUMENT : KRASIS_OK;
}

}  // namespace

int32_t krasis_gated_activation(krasis_pool *pool, const krasis_activation_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const auto rows = is_wide(pool) ? krasis::avx512::activation_rows : krasis::avx2::activation_rows;
    // An element costs some four times one that is only normed.
    krasis::parallel_rows(pool, args->tokens, 4 * args->intermediate,
                          [&](int64_t begin, int64_t end) { rows(*args, begin, end); });
    return KRASIS_OK;
}

int32_t krasis_add_rows(krasis_pool *pool, const krasis_add_rows_args *args) {
    if (!pool || !args || args->tokens < 0 || args->k <= 0 || (!args->bias && !args->x) || (args->logits && !args->x)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args->tokens == 0) return KRASIS_OK;
    if (!args->out) return KRASIS_ERR_ARGUMENT;
    const auto rows = is_wide(pool) ? krasis::avx512::add_rows : krasis::avx2::add_rows;
    krasis::parallel_rows(pool, args->tokens, args->k, [&](int64_t begin, int64_t end) { rows(*args, begin, end); });
    return KRASIS_OK;
}

int32_t krasis_gate_rows(krasis_pool *pool, float *x, const float *g, int64_t tokens, int64_t k, int32_t gate) {
    if (!pool || tokens < 0 || k <= 0 || (gate != KRASIS_GATE_SILU && gate != KRASIS_GATE_SIGMOID)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (k % 16 != 0) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !g) return KRASIS_ERR_ARGUMENT;
    const auto rows = is_wide(pool) ? krasis::avx512::gate_rows : krasis::avx2::gate_rows;
    krasis::parallel_rows(pool, tokens, 4 * k, [&](int64_t begin, int64_t end) {
        rows(x + begin * k, g + begin * k, (end - begin) * k, gate);
    });
    return KRASIS_OK;
}
