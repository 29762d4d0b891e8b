/* krasis_streams.h: rows of residual streams, gated or mixed. Part of krasis.h. */
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

/* Streams that small matrices mix (hyper-connections), x [T, streams, k] in f32; k % 16 == 0.
 * weights, in place of mixes [T, n], n = (2 + streams) streams, products of a row of x, flat: divided by the row's rms
 * (of all streams, with norm_eps), times scale and plus base [n], they become pre [streams] = sigmoid + eps, post
 * [streams] = 2 sigmoid, and comb [streams, streams] = softmax of rows + eps, then its columns divided by their sums,
 * and rounds - 1 times its rows and then its columns, each sum + eps. scale [3]: of pre, post, comb. With n = streams
 * there is pre alone, scale [1] and no rounds.
 * sum: out[t] = sum over s of shares[t ld + s] x[t, s], in the order of s; ld 0: the same shares for all rows.
 * add: x[t, s] = post[t, s] added[t] + sum over j of comb[t, j, s] x[t, j]; weights [T, n]: what weights made. */
KRASIS_API int32_t krasis_hyper_weights(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                                        float norm_eps, float *mixes, int64_t n, const float *scale, const float *base,
                                        float eps, int64_t rounds);
KRASIS_API int32_t krasis_hyper_sum(krasis_pool *pool, const float *x, int64_t tokens, int64_t streams, int64_t k,
                                    const float *shares, int64_t ld, float *out);
KRASIS_API int32_t krasis_hyper_add(krasis_pool *pool, float *x, const float *added, const float *weights,
                                    int64_t tokens, int64_t streams, int64_t k);

#ifdef __cplusplus
}
#endif

#endif
