/* krasis_cuda_streams.h: gated residual streams and hashed n-gram tables on a GPU. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_STREAMS_H
#define KRASIS_CUDA_STREAMS_H

#include "krasis_cuda_rows.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Gated residual streams, x [tokens, streams, k] in f32; k % 8 == 0, addresses multiples of 16 bytes.
 * norm: out[t, s] = x[t, s] / rms(x[t, s]) * weight[s]. */
typedef struct krasis_cuda_stream_norm_args {
    const float *x;
    const void *weight; /* [streams, k] of weight_dtype */
    float *out;         /* may be x */
    int64_t tokens, streams, k;
    int32_t weight_dtype;
    float eps;
} krasis_cuda_stream_norm_args;
KRASIS_API int32_t krasis_cuda_stream_norm(const krasis_cuda_stream_norm_args *args, void *stream);

/* x = silu(scale x); count % 8 == 0. */
typedef struct krasis_cuda_stream_squash_args {
    float *x; /* [count] */
    int64_t count;
    float scale;
    int32_t reserved;
} krasis_cuda_stream_squash_args;
KRASIS_API int32_t krasis_cuda_stream_squash(const krasis_cuda_stream_squash_args *args, void *stream);

/* out[t] = mean over s of sigmoid(gates[t, s]) * normed[t, s], in the order of s, and the same, rounded, in x; what a
 * block adds to afterwards becomes 0. */
typedef struct krasis_cuda_stream_mix_args {
    const float *normed, *gates; /* [tokens, streams, k] */
    int64_t tokens, streams, k;
    float *out;     /* [tokens, k] */
    void *x;        /* [tokens, k] of x_dtype */
    float *cleared; /* [tokens, k]; NULL: nothing is cleared */
    int32_t x_dtype;
    int32_t reserved;
} krasis_cuda_stream_mix_args;
KRASIS_API int32_t krasis_cuda_stream_mix(const krasis_cuda_stream_mix_args *args, void *stream);

/* x[t, s] += 2 sigmoid(logits[t, s] / streams) * added[t]. */
typedef struct krasis_cuda_stream_add_args {
    float *x;
    const float *added;  /* [tokens, k] */
    const float *logits; /* [tokens, streams] */
    int64_t tokens, streams, k;
} krasis_cuda_stream_add_args;
KRASIS_API int32_t krasis_cuda_stream_add(const krasis_cuda_stream_add_args *args, void *stream);

/* ---- hashed n-gram tables: what the rows that tokens chose add to their streams ----
 * weigh: gated[t, s] = sigmoid(sign(d) sqrt(max(|d|, 1e-6))) * values[t], d the product of keys[t, s] and x[t, s], each
 * normed with its weight, over sqrt(k); normed[t, s] = gated[t, s] / rms(gated[t, s]) * conv_norm[s]. */
typedef struct krasis_cuda_table_weigh_args {
    const float *x, *keys;                         /* [tokens, streams, k] */
    const float *values;                           /* [tokens, k] */
    const void *key_norm, *query_norm, *conv_norm; /* [streams, k] of norm_dtype */
    float *gated, *normed;                         /* [tokens, streams, k]; normed may be keys */
    int64_t tokens, streams, k;
    int32_t norm_dtype;
    float eps;
} krasis_cuda_table_weigh_args;
KRASIS_API int32_t krasis_cuda_table_weigh(const krasis_cuda_table_weigh_args *args, void *stream);

/* x[t] += gated[t] + silu(sum over j of conv[., j] * normed[t - (width - 1 - j) * dilation]), by channel, after the
 * ((width - 1) * dilation) rows before, the oldest first, of which a sequence at position 0 has none; they are
 * overwritten by the last ones. rows NULL: rows of one sequence that has had `start` before, whose past is at past;
 * else one row of each of several, at its position, with its past in f32 at the address of its keys and past_offset.
 * channels % 8 == 0, 1 <= width <= 64, 1 <= dilation <= 64. */
typedef struct krasis_cuda_table_add_args {
    float *x;                    /* [tokens, channels] */
    const float *gated, *normed; /* [tokens, channels] */
    const float *conv;           /* [channels, width], the newest row's last */
    int64_t tokens, channels, width, dilation;
    float *past;
    int64_t start;
    const krasis_cuda_row *rows; /* [tokens] */
    int64_t past_offset;
} krasis_cuda_table_add_args;
KRASIS_API int32_t krasis_cuda_table_add(const krasis_cuda_table_add_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_STREAMS_H */
