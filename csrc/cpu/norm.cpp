// norm.cpp: krasis_rms_norm.
#include "norm.h"

#include "acts.h"
#include "rows.h"

int32_t krasis_rms_norm(krasis_pool *pool, const float *x, int64_t tokens, int64_t k, const float *weight, float eps,
                        float *out_f32, const krasis_acts *acts) {
    if (!pool || tokens < 0 || k <= 0 || !weight || (!out_f32 && !acts)) return KRASIS_ERR_ARGUMENT;
    if (acts) {
        if (const int32_t status = krasis::check_acts(acts)) return status;
        if (acts->tokens != tokens || acts->k != k) return KRASIS_ERR_SHAPE;
    }
    if (tokens == 0) return KRASIS_OK;
    if (!x) return KRASIS_ERR_ARGUMENT;
    const krasis::NormArgs args{x, k, weight, eps, out_f32, acts};
    const auto norm =
        krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? krasis::avx512::rms_norm_rows : krasis::avx2::rms_norm_rows;
    krasis::parallel_rows(pool, tokens, k, [&](int64_t begin, int64_t end) { norm(args, begin, end); });
    return KRASIS_OK;
}
