// acts.cpp: krasis_quantize_acts.
#include "acts.h"

#include "rows.h"

int32_t krasis_quantize_acts(krasis_pool *pool, const float *x, int64_t ldx, const krasis_acts *out) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = krasis::check_acts(out)) return status;
    if (out->tokens == 0) return KRASIS_OK;
    if (!x || (ldx < out->k && out->tokens > 1)) return KRASIS_ERR_ARGUMENT;
    const auto quantize =
        krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::quantize_rows : krasis::avx2::quantize_rows;
    krasis::parallel_rows(pool, out->tokens, out->k,
                          [&](int64_t begin, int64_t end) { quantize(x, ldx, *out, begin, end); });
    return KRASIS_OK;
}
