/* krasis_cuda.h: the C ABI of libkrasis_cuda.
 *
 * Every pointer inside an argument struct is a device address unless it says otherwise; a stream is a cudaStream_t
 * passed as void *. Calls check sizes, enqueue kernels on the stream and return at once; they never allocate,
 * synchronise or print. Status codes are krasis_status plus KRASIS_ERR_CUDA, after which krasis_cuda_last_error() has
 * CUDA's words. Results do not depend on the order in which blocks run: the same inputs give the same bits, and a row
 * the same bits in any batch that runs with the same m_block (16: batches of up to 64 slots among themselves, larger
 * ones among themselves).
 *
 * Slots: the routed copies of tokens; slot = token * top_k + choice. Names: k input, n output features.
 */
#ifndef KRASIS_CUDA_H
#define KRASIS_CUDA_H

#include "krasis.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KRASIS_CUDA_ABI_VERSION 4
#define KRASIS_ERR_CUDA 100 /* a CUDA call failed */

KRASIS_API int32_t krasis_cuda_abi_version(void);
/* The words of the last KRASIS_ERR_CUDA of this thread; empty if there was none. */
KRASIS_API const char *krasis_cuda_last_error(void);

/* ---- routing: which rows belong to which expert -----------------------------------------------------------------
 * Sorts slots by expert, in slot order within one, each expert padded to whole blocks of m_block rows. The number of
 * blocks is known only on the device; buffers are sized by krasis_cuda_align_max_blocks. */

/* Rows a block of the grouped product should have for about this many slots spread over this many experts: 16, 32,
 * 64 or 128. */
KRASIS_API int32_t krasis_cuda_moe_m_block(int64_t num_slots, int64_t num_experts);
KRASIS_API int64_t krasis_cuda_align_max_blocks(int64_t num_slots, int64_t num_experts, int32_t m_block);

typedef struct krasis_cuda_align_args {
    const int32_t *ids; /* [num_slots] expert of each slot; -1: none */
    int64_t num_slots;
    int32_t num_experts; /* at most 8192 */
    int32_t m_block;
    int32_t
        *sorted_slots; /* out [max_blocks * m_block]: slots, -1 where padded; rows past the last block are untouched */
    int32_t *block_experts; /* out [max_blocks]: expert of each block; past the last untouched */
    int32_t *first_block;   /* out [num_experts + 1]: first block of each expert; the last is the number of blocks */
    int32_t *counts;        /* out [num_experts]: slots of each expert */
    int32_t *num_invalid;   /* out [1]: ids that are neither -1 nor an expert; such slots are left out */
} krasis_cuda_align_args;
KRASIS_API int32_t krasis_cuda_moe_align(const krasis_cuda_align_args *args, void *stream);

/* ---- the grouped product ------------------------------------------------------------------------------------------
 * For every slot s of experts [expert_begin, expert_end):  out[s] = activations[s / slots_per_row] x W_e,
 * W_e [k, n] in Marlin layout, 4 bits, at expert_base[e] + codes_offset, its scales at expert_base[e] + scales_offset.
 * gated: n = 2 * intermediate, columns gate then up, and out[s] = activation(gate, up) has intermediate columns; with
 * biases, those are added first.
 * scale_dtype KRASIS_CUDA_E8M0: MXFP4: codes are E2M1, scales bytes e for 2^(e - 127) of groups of 32. Weights are then
 * exact in bf16 for scales from 2^-62 to 2^65, in fp16 from 2^-19 to 2^5 (larger ones count as 2^5).
 * Sums and scales are fp32; out is rounded once. An expert whose expert_base is null is computed elsewhere: skipped.
 * k % 64 == 0; n % 64 == 0 (gated: n % 128 == 0); all addresses and strides multiples of 16 bytes. */
#define KRASIS_CUDA_E8M0 16 /* among the dtypes: of scales alone */
typedef struct krasis_cuda_moe_gemm_args {
    const void *activations;   /* [rows, k] of dtype */
    int64_t activation_stride; /* elements */
    int64_t slots_per_row;     /* top_k where rows are tokens, 1 where they are slots */
    int32_t dtype;             /* KRASIS_BF16 or KRASIS_F16 */
    int32_t gated;
    const void *const *expert_base; /* [num_experts] device addresses */
    int64_t codes_offset, scales_offset;
    int32_t scale_dtype; /* KRASIS_BF16, KRASIS_F16 or KRASIS_CUDA_E8M0 */
    int32_t m_block;     /* as given to krasis_cuda_moe_align: 16, 32, 64 or 128 */
    int64_t group;       /* 32, 64, 128, or k: one scale a channel */
    int64_t k, n;
    int64_t num_slots;
    int32_t num_experts, expert_begin, expert_end;
    int32_t max_blocks_launched; /* 0: as many blocks as run at once; otherwise at most so many */
    const int32_t *sorted_slots, *block_experts, *first_block;
    void *out;          /* [num_slots, n or n/2] of out_dtype; rows of slots not computed are untouched */
    int64_t out_stride; /* elements */
    int32_t out_dtype;  /* dtype, or KRASIS_F32 */
    int32_t reserved;
    int64_t *num_executed; /* increased by the slots computed; may be NULL */
    const float *bias;     /* [num_experts, n], gated: of gate, [num_experts, n/2]; NULL: none */
    const float *up_bias;  /* gated: [num_experts, n/2]; NULL exactly where bias is */
    int32_t activation;    /* KRASIS_CUDA_SILU (0) or another with a gate */
    float limit, alpha;
} krasis_cuda_moe_gemm_args;
KRASIS_API int32_t krasis_cuda_moe_gemm(const krasis_cuda_moe_gemm_args *args, void *stream);

/* out[t] = residual[t] + sum over j of weights[t, j] * slots[t * top_k + j], in fp32 and in the order j = 0..top_k-1; a
 * slot with id -1 (or no expert) is left out. n % 8 == 0; addresses multiples of 16 bytes. */
typedef struct krasis_cuda_moe_reduce_args {
    const void *slots; /* [tokens * top_k, n] of slots_dtype */
    int32_t slots_dtype, out_dtype;
    const int32_t *ids;   /* [tokens, top_k] */
    const float *weights; /* [tokens, top_k] */
    const void *residual; /* [tokens, n] of out_dtype; NULL: none. May be out. */
    void *out;            /* [tokens, n] */
    int64_t tokens, top_k, n;
    int32_t num_experts, reserved;
} krasis_cuda_moe_reduce_args;
KRASIS_API int32_t krasis_cuda_moe_reduce(const krasis_cuda_moe_reduce_args *args, void *stream);

/* ---- dense layers -----------------------------------------------------------------------------------------------
 * out[t] = (residual[t] +) x[t] x W^T, W int8 [n/32, k/4, 32, 4] with fp32 scales [n], sums and scales in fp32, out
 * rounded once. One or two tokens run as a matrix-vector product bound by memory, more on tensor cores; the two add
 * in different orders. k % 64 == 0, n % 32 == 0; addresses and strides multiples of 16 bytes. */
typedef struct krasis_cuda_int8_gemm_args {
    const void *x; /* [tokens, k] of dtype, rows x_stride elements apart */
    int64_t x_stride, tokens, k, n;
    int32_t dtype;     /* KRASIS_BF16 or KRASIS_F16 */
    int32_t out_dtype; /* dtype, or KRASIS_F32 */
    const int8_t *weight;
    const float *scales;
    const void *residual; /* [tokens, n] like out; NULL: none. May be out. */
    void *out;            /* [tokens, n], rows out_stride elements apart */
    int64_t out_stride;
} krasis_cuda_int8_gemm_args;
KRASIS_API int32_t krasis_cuda_int8_gemm(const krasis_cuda_int8_gemm_args *args, void *stream);

/* out[t] = x[t] / rms(x[t]) * weight, in fp32, rounded once. x, weight and out each of their own dtype; rows
 * contiguous. k % 8 == 0, addresses multiples of 16 bytes. */
typedef struct krasis_cuda_rms_norm_args {
    const void *x;
    const void *weight; /* [k] */
    void *out;
    int64_t tokens, k;
    int32_t x_dtype, weight_dtype, out_dtype;
    float eps;
} krasis_cuda_rms_norm_args;
KRASIS_API int32_t krasis_cuda_rms_norm(const krasis_cuda_rms_norm_args *args, void *stream);

/* A row of a batch of several sequences: its position, and its sequence's keys and values (a slot's memory, of which a
 * layer has the part at an offset). A row whose position is below 0 belongs to nobody: it is left out. */
typedef struct krasis_cuda_row {
    int64_t position;
    void *keys, *values;
} krasis_cuda_row;

enum {
    KRASIS_CUDA_NORM_HEAD = 0,      /* each head has its own mean square; weights [head_dim] */
    KRASIS_CUDA_NORM_FLAT = 1,      /* one mean square over q and one over k; weights [num_heads * head_dim] and
                                       [num_kv_heads * head_dim] */
    KRASIS_CUDA_NORM_HEAD_AFTER = 2 /* as HEAD, of the rotated heads */
};

/* For each row of qkv, in place for q, into the caches for k and v, in this order: adds the bias; norms q and k (NULL
 * weights: not); cuts all three to +-clip; rotates the first rotary_dims channels of each head of q and k by fp32
 * tables [max_positions, rotary_dims / 2] at the row's position: channel i with i + rotary_dims / 2, or, interleaved,
 * 2i with 2i + 1. qkv and caches are of one 16-bit dtype; sums in fp32. head_dim % 16 == 0, <= 512; rotary_dims even.
 * shared_kv: a row has no v, which is k before norm and rotation; value_norm: v is divided by its root mean square.
 * KRASIS_CUDA_NORM_FLAT has neither, nor heads of more than 256 channels.
 *
 * Row t is at position start + t of the caches [num_kv_heads, capacity, head_dim] k_cache and v_cache, unless rows says
 * otherwise: then the caches are at rows[t].keys + keys_offset and rows[t].values + values_offset (in bytes). */
typedef struct krasis_cuda_qkv_args {
    void *qkv; /* [tokens, (num_heads + 2 * num_kv_heads) * head_dim] */
    int64_t tokens, start, num_heads, num_kv_heads, head_dim;
    const void *q_norm, *k_norm; /* of norm_dtype */
    int32_t dtype, norm_dtype;
    float eps;
    int32_t norm_kind;      /* KRASIS_CUDA_NORM_... */
    const float *cos, *sin; /* may be NULL if rotary_dims is 0 */
    int64_t max_positions;
    void *k_cache, *v_cache; /* not looked at with rows */
    int64_t capacity;
    const int64_t *start_device; /* NULL: start above counts; otherwise [1], read when the kernel runs (graphs) */
    const krasis_cuda_row *rows; /* NULL; or [tokens], read when the kernel runs: neither start counts then */
    int64_t keys_offset, values_offset;
    const float *bias; /* [(num_heads + 2 * num_kv_heads) * head_dim]; NULL: none */
    int64_t rotary_dims;
    float clip; /* 0: none */
    int32_t interleaved;
    int32_t shared_kv, value_norm;
} krasis_cuda_qkv_args;
KRASIS_API int32_t krasis_cuda_qk_norm_rope_store(const krasis_cuda_qkv_args *args, void *stream);

enum {
    KRASIS_CUDA_SILU = 0,                /* silu(g) * u */
    KRASIS_CUDA_GELU_TANH = 1,           /* gelu(g) * u, gelu by tanh */
    KRASIS_CUDA_SWIGLU_OFFSET = 2,       /* g to <= limit, u to +-limit, then g * sigmoid(alpha * g) * (u + 1) */
    KRASIS_CUDA_SILU_CLAMPED_BEFORE = 3, /* silu(g to <= limit) * (u to +-limit) */
    KRASIS_CUDA_SILU_CLAMPED_AFTER = 4,  /* (silu(g) to <= limit) * (u to +-limit) */
    KRASIS_CUDA_RELU_SQUARED = 5         /* relu(u)^2: no gate, x has n columns only */
};

/* out[t] = activation(g, u) of the columns g = x[t, :n] + bias[:n] and u = x[t, n:2n] + bias[n:], in fp32, rounded
 * once. n % 8 == 0; addresses and strides multiples of 16 bytes. */
typedef struct krasis_cuda_activation_args {
    const void *x; /* [tokens, 2n] of dtype, rows x_stride elements apart */
    int64_t x_stride, tokens, n;
    const float *bias; /* [2n]; NULL: none */
    void *out;         /* [tokens, n] of dtype, rows out_stride elements apart */
    int64_t out_stride;
    int32_t dtype, kind; /* any float type; KRASIS_CUDA_SILU... */
    float limit, alpha;
} krasis_cuda_activation_args;
KRASIS_API int32_t krasis_cuda_gated_activation(const krasis_cuda_activation_args *args, void *stream);

/* hidden[t] += sigmoid(gates[t]) * (x[t] + bias) in fp32; gates NULL: the factor is 1. n % 8 == 0; addresses multiples
 * of 16 bytes. */
typedef struct krasis_cuda_add_rows_args {
    float *hidden;      /* [tokens, n] */
    const void *x;      /* [tokens, n] of x_dtype; NULL: 0 */
    const float *gates; /* [tokens]; NULL: none */
    const float *bias;  /* [n]; NULL: none */
    int64_t tokens, n;
    int32_t x_dtype, reserved;
} krasis_cuda_add_rows_args;
KRASIS_API int32_t krasis_cuda_add_rows(const krasis_cuda_add_rows_args *args, void *stream);

/* x[i] *= sigmoid(gates[i]) in fp32, rounded once: both of dtype. count % 8 == 0; addresses multiples of 16 bytes. */
typedef struct krasis_cuda_gate_rows_args {
    void *x;
    const void *gates;
    int64_t count;
    int32_t dtype, reserved;
} krasis_cuda_gate_rows_args;
KRASIS_API int32_t krasis_cuda_gate_rows(const krasis_cuda_gate_rows_args *args, void *stream);

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
 * than row by row. */
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
} krasis_cuda_gated_delta_args;
KRASIS_API int32_t krasis_cuda_gated_delta(const krasis_cuda_gated_delta_args *args, void *stream);

/* ---- routing -----------------------------------------------------------------------------------------------------
 * out[t, e] = x[t] . W[e], sums in fp32: for the few tokens of decode (tokens <= 8); k % 64 == 0. */
typedef struct krasis_cuda_router_args {
    const float *x;     /* [tokens, k] */
    const void *weight; /* [num_experts, k] of weight_dtype: KRASIS_F32, KRASIS_BF16 or KRASIS_F16 */
    float *out;         /* [tokens, num_experts] */
    int64_t tokens, k, num_experts;
    int32_t weight_dtype, reserved;
} krasis_cuda_router_args;
KRASIS_API int32_t krasis_cuda_router(const krasis_cuda_router_args *args, void *stream);

enum {
    KRASIS_CUDA_SCORE_SOFTMAX = 0,
    KRASIS_CUDA_SCORE_SIGMOID = 1,
    KRASIS_CUDA_SCORE_SQRT_SOFTPLUS = 2,
    KRASIS_CUDA_SCORE_SOFTMAX_OF_TOP = 3, /* logits choose; softmax over the chosen weighs */
    KRASIS_CUDA_SCORE_SIGMOID_OF_TOP = 4
};
enum { KRASIS_CUDA_GROUP_BEST_TWO = 0, KRASIS_CUDA_GROUP_BEST = 1 };

/* The top_k experts of each token, best first (ties: lower id first), and their weights; all in fp32.
 * Logits (+ logit_bias, then logit_cap * tanh(logits / logit_cap)) become scores; scores + correction choose, scores
 * weigh. With groups > 1, consecutive experts form groups, of which the top_groups with the highest sum of their two
 * best (or with the highest best) stay. normalize != 0: weights are divided by max(their sum, sum_floor) + sum_epsilon.
 * Then they are multiplied by scale and by the expert's expert_scale.
 * A softmax without any extra has the bits of krasis_route on the CPU. num_experts <= 1024, top_k <= 64, groups <= 64;
 * top_groups groups have top_k experts or more. */
typedef struct krasis_cuda_route_args {
    const float *logits; /* [tokens, num_experts] */
    int64_t tokens, num_experts, top_k;
    int32_t normalize;
    int32_t score;           /* KRASIS_CUDA_SCORE_... */
    int32_t *ids;            /* out [tokens, top_k] */
    float *weights;          /* out [tokens, top_k] */
    const uint8_t *resident; /* [num_experts]: not 0 where the GPU holds the expert; NULL: none */
    int32_t *gpu_ids;        /* out [tokens, top_k]: ids of resident experts, -1 for others; may be NULL */
    int32_t *cpu_ids;        /* out [tokens, top_k]: -1 for resident experts, ids of others; may be NULL */
    int64_t *counts;         /* [num_experts]: increased by how often each was chosen; may be NULL */
    const float *logit_bias, *correction, *expert_scale; /* [num_experts]; NULL: none */
    float logit_cap;                                     /* 0: none */
    float scale, sum_floor, sum_epsilon;                 /* 1, 0, 0 change nothing */
    int32_t groups, top_groups;                          /* 1, 1: no groups */
    int32_t group_score;                                 /* KRASIS_CUDA_GROUP_... */
    int32_t reserved;
} krasis_cuda_route_args;
KRASIS_API int32_t krasis_cuda_route(const krasis_cuda_route_args *args, void *stream);

/* ---- decode ------------------------------------------------------------------------------------------------------
 * Attention of num_rows queries, each over its own cache's positions up to its own (its own included; with a window
 * the last `window` of these), softmax in fp32, keys split over blocks and combined in a fixed order. Positions and
 * caches are read from device memory when the kernel runs: of rows, as in krasis_cuda_qkv_args, or, where rows is NULL,
 * those of one query. A row has the same bits whatever other rows there are. sinks: one more logit of each head in its
 * softmax, without a value. head_dim % 16 == 0, <= 512. */
typedef struct krasis_cuda_attention_args {
    const void *q;                 /* [num_rows, num_heads, head_dim] of dtype, rows q_stride elements apart */
    const void *k_cache, *v_cache; /* [num_kv_heads, capacity, head_dim] of dtype; not looked at with rows */
    void *out;                     /* [num_rows, num_heads, head_dim] of dtype, rows out_stride elements apart */
    const int64_t *position;       /* [1]; not looked at with rows */
    int64_t num_heads, num_kv_heads, head_dim, capacity;
    int32_t dtype; /* KRASIS_BF16 or KRASIS_F16 */
    float scale;
    void *workspace; /* krasis_cuda_attention_workspace_bytes(...) bytes */
    int64_t workspace_bytes;
    int64_t num_rows;            /* 1 where rows is NULL */
    const krasis_cuda_row *rows; /* NULL; or [num_rows] */
    int64_t keys_offset, values_offset;
    int64_t q_stride, out_stride; /* multiples of 8 */
    const float *sinks;           /* [num_heads]; NULL: none */
    int64_t window;               /* 0: none */
} krasis_cuda_attention_args;
KRASIS_API int64_t krasis_cuda_attention_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t head_dim,
                                                         int64_t capacity);
KRASIS_API int32_t krasis_cuda_attention_decode(const krasis_cuda_attention_args *args, void *stream);

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
 * kv_rank % 32 == rope_dim % 16 == 0, kv_rank <= 512, rope_dim <= 64. */
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
} krasis_cuda_latent_attention_args;
KRASIS_API int64_t krasis_cuda_latent_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t kv_rank,
                                                      int64_t splits);
KRASIS_API int32_t krasis_cuda_latent_attention(const krasis_cuda_latent_attention_args *args, void *stream);

/* Flags in pinned host memory hand work between GPU and CPU. epoch is a counter in device memory, so that a captured
 * graph can be replayed: advance adds 1 to it; signal stores its value to a flag after everything before it on the
 * stream is visible to the host; wait spins until the flag holds at least the epoch, and gives up after timeout_ns,
 * adding 1 to *timeouts (device or pinned memory). If *timeouts is not 0 already, it gives up at once: of many waits
 * in a graph the first one's timeout ends them all. */
KRASIS_API int32_t krasis_cuda_advance(uint64_t *epoch, void *stream);
KRASIS_API int32_t krasis_cuda_signal(uint64_t *flag, const uint64_t *epoch, void *stream);
KRASIS_API int32_t krasis_cuda_wait(const uint64_t *flag, const uint64_t *epoch, int64_t timeout_ns, uint64_t *timeouts,
                                    void *stream);

/* hidden[i] += x[i]; x may be pinned host memory, read once. count % 4 == 0; addresses multiples of 16 bytes. */
KRASIS_API int32_t krasis_cuda_add(float *hidden, const float *x, int64_t count, void *stream);

/* One launch that copies up to KRASIS_CUDA_SEND_PIECES pieces to pinned host memory and then does what signal does.
 * Meant for a few kilobytes: one block copies. Sizes are multiples of 4 bytes, addresses too. */
#define KRASIS_CUDA_SEND_PIECES 4
typedef struct krasis_cuda_send_args {
    const void *sources[KRASIS_CUDA_SEND_PIECES];
    void *destinations[KRASIS_CUDA_SEND_PIECES];
    int64_t num_bytes[KRASIS_CUDA_SEND_PIECES]; /* 0: no such piece */
    uint64_t *flag;
    const uint64_t *epoch;
} krasis_cuda_send_args;
KRASIS_API int32_t krasis_cuda_send(const krasis_cuda_send_args *args, void *stream);

/* One launch that does what wait does, adding tag instead of 1 to *timeouts, and then what add does, unless it gave up.
 * Meant for a few kilobytes: one block adds. */
typedef struct krasis_cuda_receive_args {
    const uint64_t *flag;
    const uint64_t *epoch;
    int64_t timeout_ns;
    uint64_t *timeouts; /* [1] */
    uint64_t tag;       /* not 0 */
    float *hidden;      /* [count] */
    const float *x;     /* [count] pinned host memory */
    int64_t count;
} krasis_cuda_receive_args;
KRASIS_API int32_t krasis_cuda_receive(const krasis_cuda_receive_args *args, void *stream);

/* ---- many rows: weights as 16-bit floats for a library's matrix products
 * --------------------------------------------- */

/* INT8 rows [n/32, k/4, 32, 4] with scales [n] as out [n, k] of dtype. */
KRASIS_API int32_t krasis_cuda_int8_dequant(const int8_t *weight, const float *scales, int64_t n, int64_t k,
                                            int32_t dtype, void *out, void *stream);

/* ---- host memory (not in the double)
 * ---------------------------------------------------------------------------------- Page-locks host memory for DMA and
 * maps it into the device's address space. CUDA's error, if any, is taken out of its queue and stays readable by
 * krasis_cuda_last_error: it never surfaces in a later call. read_only != 0 asks for cudaHostRegisterReadOnly. address
 * and num_bytes: multiples of 4096. */
KRASIS_API int32_t krasis_cuda_host_register(void *address, int64_t num_bytes, int32_t read_only);
KRASIS_API int32_t krasis_cuda_host_unregister(void *address);
KRASIS_API int32_t krasis_cuda_host_device_address(const void *address, void **device_address);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_H */
