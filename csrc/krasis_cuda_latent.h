/* krasis_cuda_latent.h: latent attention (MLA) in libkrasis_cuda. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_LATENT_H
#define KRASIS_CUDA_LATENT_H

#include "krasis_cuda_rows.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- latent attention (MLA) --------------------------------------------------------------------------------------
 * A token keeps one row of kv_rank + rope_dim channels for all heads: a normed latent, and what all keys share. A query
 * is taken to the latents by its head's part of a weight (krasis_cuda_int8_heads), attention runs over the rows, whose
 * first kv_rank channels are the values too, and what it gathers is taken to values by another.
 *
 * Writes the rows and turns the queries. kv: a latent, normed here (RMS, fp32), then rope_dim channels, rotated. q: a
 * head's nope_dim channels, then rope_dim that are rotated; all times 1 + temperature_scale * ln(1 + floor((position +
 * temperature_shift) / temperature_period)). Rows, positions and caches [capacity, kv_rank + rope_dim] as in
 * krasis_cuda_qkv_args. rotary_dims: rope_dim, or 0 for no rotation; it, nope_dim, rope_dim, kv_rank % 2 == 0. */
typedef struct krasis_cuda_latent_args {
    void *q;         /* [tokens, num_heads, nope_dim + rope_dim] of dtype, in place */
    const float *kv; /* [tokens, kv_rank + rope_dim], rows kv_stride elements apart */
    int64_t q_stride, kv_stride, tokens, start, num_heads, nope_dim, rope_dim, kv_rank;
    const void *norm;          /* [kv_rank] of norm_dtype */
    int32_t dtype, norm_dtype; /* dtype: 16-bit, also of the cache */
    float eps;
    int32_t interleaved;
    const float *cos, *sin; /* [max_positions, rotary_dims / 2]; may be NULL if rotary_dims is 0 */
    int64_t max_positions, rotary_dims;
    float temperature_scale; /* 0: queries are as they are */
    int32_t reserved;
    int64_t temperature_shift, temperature_period;
    void *cache; /* not looked at with rows */
    int64_t capacity;
    const krasis_cuda_row *rows; /* NULL; or [tokens] */
    int64_t keys_offset;
} krasis_cuda_latent_args;
KRASIS_API int32_t krasis_cuda_latent_store(const krasis_cuda_latent_args *args, void *stream);

/* A product a head, as krasis_cuda_int8_gemm: out[t, h] [n] = x[t, h] [k] x W_h^T, W_h the rows h * n.. of the weight.
 * Heads of x and out lie x_head_stride and out_head_stride elements apart; strides % 8 == 0. k % 64 == n % 32 == 0. */
typedef struct krasis_cuda_int8_heads_args {
    const void *x;
    int64_t x_stride, x_head_stride, tokens, num_heads, k, n;
    int32_t dtype, reserved; /* KRASIS_BF16 or KRASIS_F16, of x and out */
    const int8_t *weight;    /* int8 rows [num_heads * n / 32, k / 4, 32, 4] */
    const float *scales;     /* [num_heads * n] */
    void *out;
    int64_t out_stride, out_head_stride;
} krasis_cuda_int8_heads_args;
KRASIS_API int32_t krasis_cuda_int8_heads(const krasis_cuda_int8_heads_args *args, void *stream);

/* Attention of num_rows queries over latents, each over its cache up to its own position, which is that of rows or,
 * where rows is NULL, start + row. q_latent: queries taken to the latents, [num_rows, num_heads, kv_rank]; out, of the
 * same form, may be q_latent itself. q_rope: their rotated rest, rows q_stride and heads q_head_stride elements apart.
 * Keys are split over `splits` blocks (1 to 128), combined in a fixed order: the same bits for the same splits.
 * kv_rank % 32 == rope_dim % 16 == 0, kv_rank <= 512, rope_dim <= 64. With chosen a row attends to those positions of
 * what it sees alone, or to the first ones of chosen, as many as it sees, if these are fewer than budget. */
typedef struct krasis_cuda_latent_attention_args {
    const void *q_latent, *q_rope; /* of dtype, KRASIS_BF16 or KRASIS_F16 */
    void *out;
    int64_t q_stride, q_head_stride; /* multiples of 2 */
    int64_t num_rows, num_heads, kv_rank, rope_dim, capacity, start, splits;
    const void *cache;           /* [capacity, kv_rank + rope_dim]; not looked at with rows */
    const krasis_cuda_row *rows; /* NULL; or [num_rows] */
    int64_t keys_offset;
    void *workspace; /* krasis_cuda_latent_workspace_bytes(...) bytes; may be NULL with one split */
    int64_t workspace_bytes;
    int32_t dtype;
    float scale;
    const int32_t *chosen; /* NULL; or [num_rows, budget], of krasis_cuda_choose */
    int64_t budget;        /* not looked at without chosen */
} krasis_cuda_latent_attention_args;
KRASIS_API int64_t krasis_cuda_latent_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t kv_rank,
                                                      int64_t splits);
KRASIS_API int32_t krasis_cuda_latent_attention(const krasis_cuda_latent_attention_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_LATENT_H */
