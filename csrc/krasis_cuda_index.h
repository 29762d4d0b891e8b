/* krasis_cuda_index.h: an index over tokens (DSA), which says what keys a query attends to. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_INDEX_H
#define KRASIS_CUDA_INDEX_H

#include "krasis_cuda_rows.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the index keeps of a token: k after a layer norm with eps, its first rotary_dims channels rotated (halves, or
 * neighbours if interleaved), where a slot of latents has its values: [capacity, dim] of dtype. q, if there is one, is
 * rotated in place. dim % 16 == 0, dim <= 256, heads * dim <= 32768. Rows and positions as in krasis_cuda_latent_args.
 */
typedef struct krasis_cuda_index_args {
    const float *k; /* [tokens, dim] */
    float *q;       /* NULL; or [tokens, heads, dim] */
    int64_t tokens, heads, dim, start;
    const void *norm;          /* [dim] of norm_dtype */
    const float *bias;         /* [dim] */
    int32_t dtype, norm_dtype; /* dtype: 16-bit, of the cache */
    float eps;
    int32_t interleaved;
    const float *cos, *sin; /* [max_positions, rotary_dims / 2]; may be NULL if rotary_dims is 0 */
    int64_t max_positions, rotary_dims;
    void *cache; /* [capacity, dim]; not looked at with rows */
    int64_t capacity;
    const krasis_cuda_row *rows; /* NULL; or [tokens] */
    int64_t values_offset;
} krasis_cuda_index_args;
KRASIS_API int32_t krasis_cuda_index_store(const krasis_cuda_index_args *args, void *stream);

/* The positions that rows attend to, ascending: of the keys that a row sees the budget with the highest sums over the
 * heads of weights[h] * max(0, q[h] . key), of equal ones the first; all, if there are no more. A row's products are
 * those of 16-bit keys and q as the sum of two 16-bit floats, added up in fp32; the choice among the sums is exact. */
typedef struct krasis_cuda_choose_args {
    const float *q;       /* [tokens, heads, dim], rotated */
    const float *weights; /* [tokens, heads] */
    int64_t tokens, heads, dim, start, budget, capacity;
    const void *cache;           /* [capacity, dim]; not looked at with rows */
    const krasis_cuda_row *rows; /* NULL; or [tokens] */
    int64_t values_offset;
    int32_t dtype, reserved; /* KRASIS_BF16 or KRASIS_F16, of the cache */
    int32_t *chosen;         /* [tokens, budget] */
    float *scores;           /* workspace [tokens, score_columns] */
    int64_t score_columns;   /* % 4 == 0; with rows at least capacity, else start + tokens */
} krasis_cuda_choose_args;
KRASIS_API int32_t krasis_cuda_choose(const krasis_cuda_choose_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_INDEX_H */
