// streams.cpp: krasis_stream_norm, _squash, _mix and _add.
#include "streams.h"

#include "rows.h"

namespace {

bool is_shape(int64_t tokens, int64_t streams, int64_t k) {
    return tokens >= 0 && streams > 0 && streams <= 64 && k > 0 && k % 16 == 0;
}

template <class Rows>
void run(krasis_pool *pool, int64_t tokens, const krasis::StreamArgs &args, Rows avx512, Rows avx2) {
    const Rows rows = krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? avx512 : avx2;
    krasis::parallel_rows(pool, tokens, args.streams * args.k,
                          [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace

int32_t krasis_stream_norm(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                           const float *weight, float eps, float *out) {
    if (!pool || !weight) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !out) return KRASIS_ERR_ARGUMENT;
    run(pool, tokens, {x, nullptr, streams, k, eps, out, weight}, krasis::avx512::stream_norm,
        krasis::avx2::stream_norm);
    return KRASIS_OK;
}

int32_t krasis_stream_squash(krasis_pool *pool, float *x, int64_t tokens, int64_t k, float scale) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (tokens < 0 || k <= 0) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x) return KRASIS_ERR_ARGUMENT;
    run(pool, tokens, {nullptr, nullptr, 1, k, scale, x, nullptr}, krasis::avx512::stream_squash,
        krasis::avx2::stream_squash);
    return KRASIS_OK;
}

int32_t krasis_stream_mix(krasis_pool *pool, const float *normed, const float *gates, int64_t tokens, int64_t streams,
                          int64_t k, float *out) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!normed || !gates || !out) return KRASIS_ERR_ARGUMENT;
    run(pool, tokens, {normed, gates, streams, k, 0.0f, out, nullptr}, krasis::avx512::stream_mix,
        krasis::avx2::stream_mix);
    return KRASIS_OK;
}

int32_t krasis_stream_add(krasis_pool *pool, float *x, const float *added, const float *logits, int64_t tokens,
                          int64_t streams, int64_t k) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    if (!is_shape(tokens, streams, k)) return KRASIS_ERR_SHAPE;
    if (tokens == 0) return KRASIS_OK;
    if (!x || !added || !logits) return KRASIS_ERR_ARGUMENT;
    run(pool, tokens, {nullptr, logits, streams, k, 0.0f, x, added}, krasis::avx512::stream_add,
        krasis::avx2::stream_add);
    return KRASIS_OK;
}
