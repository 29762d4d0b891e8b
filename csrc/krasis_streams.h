/* krasis_streams.h: rows of gated residual streams. Part of krasis.h. */
#ifndef KRASIS_STREAMS_H
#define KRASIS_STREAMS_H

#include "krasis_pool.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Gated residual streams, x [T, streams, k] in f32; k % 16 == 0.
 * norm: out[t, s] = x[t, s] / rms(x[t, s]) * weight[s]; out may be x.
 * squash: x = silu(scale x) of [T, k], any k.
 * mix: out[t] = mean over s of sigmoid(gates[t, s]) * normed[t, s], in the order of s.
 * add: x[t, s] += 2 sigmoid(logits[t, s] / streams) * added[t]. */
KRASIS_API int32_t krasis_stream_norm(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                                      const float *weight, float eps, float *out);
KRASIS_API int32_t krasis_stream_squash(krasis_pool *pool, float *x, int64_t tokens, int64_t k, float scale);
KRASIS_API int32_t krasis_stream_mix(krasis_pool *pool, const float *normed, const float *gates, int64_t tokens,
                                     int64_t streams, int64_t k, float *out);
KRASIS_API int32_t krasis_stream_add(krasis_pool *pool, float *x, const float *added, const float *logits,
                                     int64_t tokens, int64_t streams, int64_t k);

#ifdef __cplusplus
}
#endif

#endif
