/* krasis_cuda_delta.h: the gated delta rule, Mamba-2, and short convolutions alone. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_DELTA_H
#define KRASIS_CUDA_DELTA_H

#include "krasis_cuda_rows.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KRASIS_CUDA_GATE_SILU = 0, KRASIS_CUDA_GATE_SIGMOID = 1 };
#define KRASIS_CUDA_DELTA_CHUNK 64          /* rows */
#define KRASIS_CUDA_DELTA_CHUNK_BYTES 16896 /* of a chunk's workspace, for each value head */

/* The gated delta rule after a short convolution. A row of x has q and k [key_heads, key_dim], v [value_heads,
 * value_dim] and z like v; q, k and v are the channels of the convolution: each is a sum of conv_width taps over the
 * row and those before it, then silu. q and k become vectors of length 1, q times key_dim^-1/2. Value head h has the
 * q and k of key head h / (value_heads / key_heads) and the step b = sigmoid(gates[t, h]) and the decay
 * d = exp(-exp(a_log[h]) softplus(gates[t, value_heads + h] + dt_bias[h])). Of each row in turn, with the head's matrix
 * S [key_dim, value_dim]:
 *     S = d S;  S += k (b (v - S^T k))^T;  o = S^T q;  out[t, h] = o / rms(o) * gate_norm * gate(z)
 * In fp32 but for x, mixed and out, which are of dtype.
 *
 * State, fp32: S of all heads [value_heads, value_dim / 16, key_dim, 16], and the last conv_width - 1 rows before the
 * convolution [conv_width - 1, channels], the oldest first. The rows are of one sequence, whose state is at matrices
 * and columns and which has had start rows; or, with a table, each row is of a sequence of its own, which has had
 * rows[t].position rows and whose state is at rows[t].keys + matrices_offset and + columns_offset (in bytes). Before a
 * sequence's first row its state is zero, whatever is there. A row whose position is below 0 belongs to nobody.
 *
 * key_dim and value_dim: multiples of 16 up to 128; conv_width <= 8; addresses multiples of 16 bytes. With a workspace,
 * 16 rows of a sequence or more go through in chunks on tensor cores, where factors are rounded to dtype: other bits
 * than row by row.
 *
 * With decays each channel of a key has its own (Kimi Delta Attention): gates are b alone, [tokens, value_heads], z is
 * apart, dt_bias has [value_heads * key_dim], and row i of S is multiplied by exp(-exp(a_log[h]) softplus(decays[t, h,
 * i]
 * + dt_bias[h, i])), or with a lower_bound by exp(lower_bound sigmoid(exp(a_log[h]) (decays[t, h, i] + dt_bias[h,
 * i]))). All rows go through one by one. */
typedef struct krasis_cuda_gated_delta_args {
    const void *x; /* [tokens, channels + value_heads * value_dim] of dtype */
    float *gates;  /* [tokens, 2 * value_heads]; overwritten */
    void *mixed;   /* [tokens, channels] of dtype; overwritten */
    void *out;     /* [tokens, value_heads * value_dim] of dtype */
    int64_t tokens, key_heads, value_heads, key_dim, value_dim, conv_width;
    const float *conv;            /* [channels, conv_width], the newest row's last */
    const float *a_log, *dt_bias; /* [value_heads] */
    const void *gate_norm;        /* [value_dim] of norm_dtype */
    int32_t dtype, norm_dtype;
    float eps;
    int32_t gate; /* KRASIS_CUDA_GATE_... */
    float *matrices, *columns;
    int64_t start;
    const krasis_cuda_row *rows; /* NULL; or [tokens], read when the kernel runs */
    int64_t matrices_offset, columns_offset;
    void *chunks;       /* NULL; or a workspace of num_chunks * value_heads * KRASIS_CUDA_DELTA_CHUNK_BYTES */
    int64_t num_chunks; /* so many chunks at once */
    float *decays;      /* NULL; or [tokens, value_heads * key_dim]; overwritten */
    const float *z;     /* with decays: [tokens, value_heads * value_dim], which x then lacks */
    float lower_bound;  /* 0: none */
    int32_t reserved;
} krasis_cuda_gated_delta_args;
KRASIS_API int32_t krasis_cuda_gated_delta(const krasis_cuda_gated_delta_args *args, void *stream);

/* Mamba-2. A row of x has z [heads * head_dim], then the channels of a convolution: inputs u [heads, head_dim], B and C
 * [groups, state_dim] each. A channel becomes silu(its bias + the sum of conv_width taps over the row and those before
 * it). Head h has B and C of group h / (heads / groups), the step s = max(min_step, softplus(steps[t, h] + dt_bias[h]))
 * and the matrix S [state_dim, head_dim]. Of each row in turn:
 *     S = exp(-exp(a_log[h]) s) S + B (s u)^T;  y = S^T C + skip[h] u
 * and, by groups of heads, with g = y silu(z): out = g / rms(g) * gate_norm. In fp32 but for x, mixed and out, which
 * are of dtype.
 *
 * State, fp32: S of all heads [heads, head_dim / 16, state_dim, 16], and the last conv_width - 1 rows before the
 * convolution [conv_width - 1, channels], the oldest first; otherwise as krasis_cuda_gated_delta has it. head_dim:
 * a multiple of 16; state_dim: a multiple of 2 up to 256; conv_width <= 8; ldx a multiple of 8; addresses multiples of
 * 16 bytes. Rows go through one by one: a sequence gets the same bits however it is cut into calls. */
typedef struct krasis_cuda_mamba2_args {
    const void *x;  /* [tokens, ldx] of dtype, of which heads * head_dim + channels columns are used */
    float *steps;   /* [tokens, heads]; overwritten */
    void *mixed;    /* [tokens, channels] of dtype; overwritten */
    float *scanned; /* [tokens, heads * head_dim]; overwritten */
    void *out;      /* [tokens, heads * head_dim] of dtype */
    int64_t ldx, tokens, heads, head_dim, state_dim, groups, conv_width;
    const float *conv, *conv_bias;       /* [channels, conv_width], the newest row's last; [channels] or NULL */
    const float *a_log, *dt_bias, *skip; /* [heads] */
    const void *gate_norm;               /* [heads * head_dim] of norm_dtype */
    int32_t dtype, norm_dtype;
    float eps, min_step;
    float *matrices, *columns;
    int64_t start;
    const krasis_cuda_row *rows; /* NULL; or [tokens], read when the kernel runs */
    int64_t matrices_offset, columns_offset;
} krasis_cuda_mamba2_args;
KRASIS_API int32_t krasis_cuda_mamba2(const krasis_cuda_mamba2_args *args, void *stream);

/* A gated short convolution: out = c * conv(b * x) of rows of b, c and x, by channel over the last `width` rows of a
 * sequence, in fp32 between. State, fp32: the last width - 1 products b * x [width - 1, channels], the oldest first, at
 * columns, or with a table at rows[t].keys + columns_offset; otherwise as krasis_cuda_gated_delta has it. channels: a
 * multiple of 8; width <= 8; addresses multiples of 16 bytes. */
typedef struct krasis_cuda_short_conv_args {
    const void *x; /* [tokens, 3 * channels] of dtype */
    void *out;     /* [tokens, channels] of dtype */
    int64_t tokens, channels, width;
    const float *conv; /* [channels, width], the newest row's last */
    float *columns;
    int64_t start;
    const krasis_cuda_row *rows; /* NULL; or [tokens], read when the kernel runs */
    int64_t columns_offset;
    int32_t dtype, reserved;
} krasis_cuda_short_conv_args;
KRASIS_API int32_t krasis_cuda_short_conv(const krasis_cuda_short_conv_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_DELTA_H */
