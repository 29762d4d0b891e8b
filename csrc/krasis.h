/* krasis.h: the whole C ABI of libkrasis_cpu: what computes stands here, the rest in the headers that this includes.
 *
 * Plain pointers and sizes in, an error code out. The library knows neither torch nor Python, keeps no
 * global state but the CPU probe and the guard of mapped files, and prints nothing but what the guard was
 * given to print. Every function that works on tensors takes a pool;
 * the pool carries the threads and the instruction set. Results are bit-identical for any thread count,
 * and, because every output element is accumulated in one fixed order (block after block along k), a
 * batch of n tokens gives the same bits as n batches of one.
 *
 * Names: T tokens, n output features (rows of a weight), k input features, E experts.
 * Shapes are row-major. Sizes that end in _bytes are bytes, others are elements.
 */
#ifndef KRASIS_H
#define KRASIS_H

#include "krasis_files.h"
#include "krasis_pack.h"
#include "krasis_pool.h"
#include "krasis_streams.h"
#include "krasis_types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KRASIS_ABI_VERSION 4

/* ---- compute (runtime) -----------------------------------------------------------------------------------
 * Activations are quantised to int8 per block of 32: x ~ q * scale[block], scale = absmax/127 (0 for a zero block),
 * q = round half to even(x / scale); sum[block] = sum of q (lets kernels use unsigned weights). */

typedef struct krasis_acts {
    int8_t *q;      /* [T, k] , 64-byte aligned */
    float *scale;   /* [T, k/32] */
    int32_t *sum;   /* [T, k/32] */
    int64_t tokens; /* T */
    int64_t k;
} krasis_acts;

KRASIS_API int32_t krasis_quantize_acts(krasis_pool *pool, const float *x, int64_t ldx, const krasis_acts *out);

/* out = x / rms(x) * weight. out_f32 may be NULL (contiguous [T, k]); acts may be NULL. */
KRASIS_API int32_t krasis_rms_norm(krasis_pool *pool, const float *x, int64_t tokens, int64_t k, const float *weight,
                                   float eps, float *out_f32, const krasis_acts *acts);

/* out[T, ldo] (+)= acts x W^T; W in int8 rows [n/32, k/4, 32, 4] with f32 scales [n]. accumulate != 0 adds to out. */
KRASIS_API int32_t krasis_gemm_int8_rows(krasis_pool *pool, const krasis_acts *acts, const int8_t *weight,
                                         const float *scales, int64_t n, float *out, int64_t ldo, int32_t accumulate);

/* out[T, n] = x[T, k] x W[n, k]^T in f32; W of dtype F32, BF16 or F16 (router). */
KRASIS_API int32_t krasis_gemm_float(krasis_pool *pool, const float *x, int64_t tokens, int64_t k, const void *weight,
                                     int32_t dtype, int64_t n, float *out);

/* How a token's experts are chosen and weighed. l = logits + bias, then logit_cap * tanh(l / logit_cap). Scores s of l:
 * softmax over all experts, sigmoid, sqrt(softplus), or (OF_TOP) l itself. Experts are chosen by s + correction_bias:
 * of `groups` groups of consecutive experts the top_groups best stay, by the sum of their two best or by their best; of
 * these the top_k largest, largest first (ties: lower id first, of groups too). They weigh by s alone; OF_TOP: by the
 * softmax over the chosen l, or their sigmoid. renormalise: weights are divided by max(sum, sum_floor) + sum_epsilon.
 * Then they are multiplied by scale and by expert_scale of the expert. */
typedef enum krasis_score {
    KRASIS_SCORE_SOFTMAX = 0,
    KRASIS_SCORE_SIGMOID = 1,
    KRASIS_SCORE_SQRT_SOFTPLUS = 2,
    KRASIS_SCORE_SOFTMAX_OF_TOP = 3,
    KRASIS_SCORE_SIGMOID_OF_TOP = 4
} krasis_score;

typedef enum krasis_group_score { KRASIS_GROUP_BEST_TWO = 0, KRASIS_GROUP_BEST = 1 } krasis_group_score;

typedef struct krasis_route_args {
    const float *logits; /* [T, E] */
    int64_t tokens, num_experts, top_k;
    int32_t score; /* krasis_score */
    int32_t renormalise;
    int64_t groups, top_groups; /* groups 1: none; E % groups == 0, top_groups * E / groups >= top_k */
    int32_t group_score;        /* krasis_group_score */
    float logit_cap;            /* 0: none */
    const float *bias, *correction_bias, *expert_scale; /* [E] or NULL */
    float sum_floor, sum_epsilon, scale;
    int32_t reserved;
    int32_t *ids;   /* [T, top_k] */
    float *weights; /* [T, top_k] */
} krasis_route_args;
KRASIS_API int32_t krasis_route(krasis_pool *pool, const krasis_route_args *args);

/* What stands between gate (g), up (u) and down; clip(x) = x within +-limit. limit > 0 where it appears. */
typedef enum krasis_activation {
    KRASIS_ACT_SILU = 0,                /* silu(g) u */
    KRASIS_ACT_GELU_TANH = 1,           /* gelu(g) u, by the tanh formula */
    KRASIS_ACT_SWIGLU_OFFSET = 2,       /* h sigmoid(alpha h) (clip(u) + 1), h = min(g, limit) */
    KRASIS_ACT_SILU_CLAMPED_BEFORE = 3, /* silu(min(g, limit)) clip(u) */
    KRASIS_ACT_SILU_CLAMPED_AFTER = 4,  /* min(silu(g), limit) clip(u) */
    KRASIS_ACT_RELU_SQUARED = 5         /* relu(u)^2, without a gate */
} krasis_activation;

/* The activation of a dense MLP. x: [T, 2 I], gate columns, then up columns; without a gate [T, I]. I % 16 == 0. out,
 * acts: either may be NULL, not both; acts asks for I % 32 == 0. */
typedef struct krasis_activation_args {
    const float *x;
    int64_t tokens, intermediate;
    int32_t kind; /* krasis_activation */
    float limit, alpha;
    int32_t reserved;
    float *out;              /* [T, I] */
    const krasis_acts *acts; /* [T, I] */
} krasis_activation_args;
KRASIS_API int32_t krasis_gated_activation(krasis_pool *pool, const krasis_activation_args *args);

/* out[t] += bias, then out[t] += x[t] * sigmoid(logits[t]) (logits NULL: out[t] += x[t]). Either of bias and x may be
 * NULL, not both; logits need x. An MLP without a gate needs none of this: krasis_gemm_int8_rows accumulates. */
typedef struct krasis_add_rows_args {
    float *out; /* [T, k] */
    int64_t tokens, k;
    const float *bias;   /* [k] */
    const float *x;      /* [T, k] */
    const float *logits; /* [T] */
    float scale;         /* of the sum; 0: 1 */
    int32_t reserved;
} krasis_add_rows_args;
KRASIS_API int32_t krasis_add_rows(krasis_pool *pool, const krasis_add_rows_args *args);

/* The routed experts of one layer: out[T, hidden] += sum_j weights[t, j] * W2_e activation(gate, up), e = ids[t, j].
 * blob: [E, expert_stride_bytes]; within an expert w13 tiles (2*intermediate rows x hidden, gate/up interleaved by 16;
 * intermediate rows of up for an activation without a gate), then w2 tiles (hidden rows x intermediate). An id of -1 is
 * skipped. Terms are added in the order j = 0..top_k-1. The intermediate is quantised to int8 per 32 again. *executed
 * (may be NULL) is increased by the number of (token, expert) pairs computed. workspace:
 * krasis_moe_workspace_bytes(...) bytes, 64-byte aligned. */
typedef struct krasis_moe_args {
    const uint8_t *blob;
    int64_t expert_stride_bytes;
    int32_t tiles;      /* krasis_tiles */
    int32_t activation; /* krasis_activation */
    int64_t num_experts, hidden, intermediate, top_k;
    const krasis_acts *acts; /* [T, hidden] */
    const int32_t *ids;      /* [T, top_k] */
    const float *weights;    /* [T, top_k] */
    float *out;              /* [T, hidden] */
    void *workspace;
    int64_t workspace_bytes;
    int64_t *executed;
    float limit, alpha; /* of the activation, where it has them */
    /* [E, intermediate], [E, intermediate], [E, hidden], or NULL: added to gate, to up, and to down before it is
     * weighted. */
    const float *gate_bias, *up_bias, *down_bias;
} krasis_moe_args;

/* Both ..._workspace_bytes functions return -1 for impossible sizes and never shrink when a number of rows or the
 * longest end grows. */
KRASIS_API int64_t krasis_moe_workspace_bytes(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t num_experts,
                                              int64_t top_k);
KRASIS_API int32_t krasis_moe(krasis_pool *pool, const krasis_moe_args *args);

/* Consecutive rows of a call that belong to one sequence, at positions start.. of its slot's memory. The spans of a
 * call lie in the order of their rows and cover all of them; those without rows are passed over. A slot has one span at
 * most. A layer's keys are [num_kv_heads, capacity, head_dim] of kv_dtype (F32 or F16) at keys + keys_offset_bytes, its
 * values alike at values + values_offset_bytes; both offsets are multiples of the element. With kv_dtype I8 a row is
 * head_dim int8 codes and then a float32 scale, absmax / 127 of the row, 0 for a row of zeros; where keys hold the
 * values two scales, of the value's channels and of the others; offsets are multiples of 4. A sequence gets the bits of
 * a call of its own. Where a call has a ring, position p lies at p % capacity, and start may be anything: a layer with
 * a window keeps its last positions alone. Then capacity % KRASIS_RING_STEP == 0, and a span's rows, with the window -
 * 1 positions before its first one, are at most capacity. */
#define KRASIS_RING_STEP 64
typedef struct krasis_span {
    int64_t first_row, rows, start;
    void *keys, *values;
} krasis_span;

typedef enum krasis_qk_norm {
    KRASIS_QK_NORM_NONE = 0,
    KRASIS_QK_NORM_HEAD = 1, /* RMS over each head, weights [head_dim] */
    KRASIS_QK_NORM_FLAT = 2, /* RMS over all of q and of k: weights [num_heads * head_dim], [num_kv_heads * head_dim] */
    KRASIS_QK_NORM_HEAD_AFTER = 3 /* as HEAD, of the rotated heads */
} krasis_qk_norm;

typedef enum krasis_rope_style {
    KRASIS_ROPE_HALF = 0,       /* channel i turns with i + rotary_dims / 2 */
    KRASIS_ROPE_INTERLEAVED = 1 /* 2 i with 2 i + 1 */
} krasis_rope_style;

/* qkv: f32 [T, (num_heads + 2*num_kv_heads) * head_dim], in this order: += bias (in place); RMS norm of q and k; q, k
 * and v cut to +-clip; q and k rotated in their first rotary_dims channels. q is left in qkv; k and v go to the spans'
 * memory (with kv_dtype I8 k is overwritten in qkv). head_dim % 16 == 0, <= 512; rotary_dims even, <= head_dim, 0: no
 * rotation. */
typedef struct krasis_qkv_args {
    float *qkv;
    int64_t tokens, num_heads, num_kv_heads, head_dim;
    const float *bias; /* [(num_heads + 2*num_kv_heads) * head_dim] or NULL */
    const float *q_norm, *k_norm;
    int32_t norm; /* krasis_qk_norm */
    float eps;
    float clip; /* 0: none */
    int32_t rope_style;
    const float *cos, *sin; /* [max_positions, rotary_dims / 2] */
    int64_t max_positions, rotary_dims;
    const krasis_span *spans;
    int64_t num_spans, keys_offset_bytes, values_offset_bytes, capacity;
    int32_t kv_dtype;
    int32_t reserved;
    int32_t shared_kv;  /* not 0: qkv has no v, which is k before norm and rotation */
    int32_t value_norm; /* not 0: v's heads are divided by their RMS */
    int64_t ring;       /* not 0: the spans' memory is a ring */
} krasis_qkv_args;
KRASIS_API int32_t krasis_qk_norm_rope_store(krasis_pool *pool, const krasis_qkv_args *args);

/* Causal grouped-query attention of every row over the keys j of its slot with 0 <= position - j, and < window if there
 * is one. q: f32 [T, ldq] (head h at h*head_dim), out: f32 [T, num_heads*head_dim]. Softmax in f32 of scale * q k, with
 * sinks one more logit a head in its denominator; in fixed blocks of keys, so that the result does not depend on the
 * call's other rows or the threads. head_dim % 16 == 0, <= 576. With value_dim (% 16 == 0, <= head_dim) the spans'
 * values are not read and out is [T, num_heads*value_dim]. workspace: krasis_attention_workspace_bytes of the call's
 * rows and the longest of its spans' ends (start + rows) suffices; more lets more sequences run at once. */
typedef struct krasis_attention_args {
    const float *q;
    int64_t ldq, tokens, num_heads, num_kv_heads, head_dim;
    const krasis_span *spans;
    int64_t num_spans, keys_offset_bytes, values_offset_bytes, capacity;
    int32_t kv_dtype;
    float scale;
    int64_t window;     /* 0: none */
    const float *sinks; /* [num_heads] or NULL */
    float *out;
    void *workspace;
    int64_t workspace_bytes;
    int64_t value_dim; /* > 0: a value is the first value_dim channels of its key; 0: values are apart */
    int64_t ring;      /* not 0: the spans' memory is a ring; needs a window */
} krasis_attention_args;
KRASIS_API int64_t krasis_attention_workspace_bytes(int64_t num_rows, int64_t longest_end, int64_t num_heads,
                                                    int64_t head_dim);
KRASIS_API int32_t krasis_attention(krasis_pool *pool, const krasis_attention_args *args);

/* What latent attention (MLA) keeps and asks of a row. kv: a latent of kv_rank channels, then rope_dim channels that
 * all heads share as the rest of their keys: the latent is normed (RMS) and the rest rotated, and both together go to
 * the spans' keys, one head of kv_rank + rope_dim. q: a head's nope_dim channels, then rope_dim that are rotated; both
 * times 1 + temperature_scale ln(1 + floor((position + temperature_shift) / temperature_period)). The first become
 * acts, token-major rows of a head each; the others the last rope_dim channels of each head of queries, whose first
 * kv_rank are left alone (krasis_gemm_int8_heads fills them). nope_dim % 32 == 0, kv_rank and rope_dim % 16 == 0;
 * rotary_dims: rope_dim, or 0 for no rotation. With kv_dtype I8 kv_rank + rope_dim <= 576. */
typedef struct krasis_latent_args {
    const float *q;  /* [T, ldq]: num_heads x (nope_dim + rope_dim) */
    const float *kv; /* [T, ldkv] */
    int64_t ldq, ldkv, tokens, num_heads, nope_dim, rope_dim, kv_rank;
    const float *norm; /* [kv_rank] */
    float eps;
    int32_t rope_style;
    const float *cos, *sin; /* [max_positions, rotary_dims / 2] */
    int64_t max_positions, rotary_dims;
    float temperature_scale; /* 0: queries are as they are */
    int32_t temperature_shift;
    int64_t temperature_period;
    const krasis_span *spans;
    int64_t num_spans, keys_offset_bytes, values_offset_bytes, capacity;
    int32_t kv_dtype;
    int32_t reserved;
    const krasis_acts *acts; /* [T * num_heads, nope_dim] */
    float *queries;          /* [T, num_heads * (kv_rank + rope_dim)] */
} krasis_latent_args;
KRASIS_API int32_t krasis_latent_store(krasis_pool *pool, const krasis_latent_args *args);

/* A product a head: out[t * ldo + h * ldh + i] = acts row t * num_heads + h x row h * n + i of the weight, i < n.
 * weight, scales: int8 rows as krasis_gemm_int8_rows reads them, num_heads * n rows; acts: T * num_heads rows of k.
 * n % 32 == 0, n <= ldh, num_heads * ldh - (ldh - n) <= ldo. */
KRASIS_API int32_t krasis_gemm_int8_heads(krasis_pool *pool, const krasis_acts *acts, const int8_t *weight,
                                          const float *scales, int64_t num_heads, int64_t n, float *out, int64_t ldh,
                                          int64_t ldo);

/* An index over tokens (DSA) says which keys a query attends to. A token's key: k after a layer norm with eps, its
 * first rotary_dims channels rotated, is kept in its span's values. q, where it is given, is rotated alike, in place.
 * dim % 16 == 0, <= 256; heads * dim <= 32768. With gates pools of block tokens are scored: a token's key and then its
 * gates are kept, but in place of the key of a pool's last token the pool's: by channel the keys of its tokens, as they
 * are kept, weighed by the softmax of gate + position over them. */
typedef struct krasis_index_args {
    const float *k; /* [T, dim] */
    float *q;       /* [T, heads * dim] or NULL */
    int64_t tokens, heads, dim;
    const float *norm, *bias; /* [dim] */
    float eps;
    int32_t rope_style;
    const float *cos, *sin; /* [max_positions, rotary_dims / 2] */
    int64_t max_positions, rotary_dims;
    const krasis_span *spans;
    int64_t num_spans, keys_offset_bytes, values_offset_bytes, capacity;
    int32_t kv_dtype, reserved;
    const float *gates, *positions; /* [T, dim], [block, dim]; both or neither */
    int64_t block;                  /* 1 without gates */
} krasis_index_args;
KRASIS_API int32_t krasis_index_store(krasis_pool *pool, const krasis_index_args *args);

/* chosen: of each row the positions that it attends to, ascending: all that it sees if these are budget at most, else
 * the budget best by sum over heads of weight * max(q . key, 0), of equals the first (-0 equals 0), in any call.
 * workspace: 4 bytes a position of the longest span beyond budget, in blocks of 64; 16 times that is of use. */
typedef struct krasis_choose_args {
    const float *q;       /* [T, heads * dim], rotated */
    const float *weights; /* [T, heads] */
    int64_t tokens, heads, dim;
    const krasis_span *spans;
    int64_t num_spans, keys_offset_bytes, values_offset_bytes, capacity;
    int32_t kv_dtype, reserved;
    int32_t *chosen; /* [T, budget + block - 1] */
    int64_t budget;
    void *workspace;
    int64_t workspace_bytes, block;
} krasis_choose_args;
KRASIS_API int32_t krasis_choose(krasis_pool *pool, const krasis_choose_args *args);

/* krasis_attention of values that are the beginning of their keys (one head of keys, no window), over the positions
 * that krasis_choose gave: a row of which all are chosen gets the same bits. workspace: n = budget + block - 1 keys, in
 * whole lines of 64 bytes, and krasis_attention_workspace_bytes(1, n, ...), the same; 16 times as much is of use. */
KRASIS_API int32_t krasis_attention_chosen(krasis_pool *pool, const krasis_attention_args *args, const int32_t *chosen,
                                           int64_t budget, int64_t block);

/* A gate on what a mixer gives. */
typedef enum krasis_gate { KRASIS_GATE_SILU = 0, KRASIS_GATE_SIGMOID = 1 } krasis_gate;

/* The gated delta rule, between its projections. x: f32 [T, ldx], a row is q and k of each key
 * head, v and z of each value head; overwritten. gates: f32 [T, 2 * value_heads], b and a; overwritten. Then:
 * q, k and v are convolved by channel over the last conv_width tokens, and silu; q and k are brought to length 1 (1e-6
 * is added in the root), q times key_dim^-1/2. Of each value head, with q and k of key head h / (value_heads /
 * key_heads) and a matrix S [key_dim, value_dim]: S *= exp(-rate softplus(a + dt_bias)); S += k (sigmoid(b) (v - S^T
 * k))^T; o = S^T q. out: f32 [T, value_heads * value_dim] = o / rms(o) * gate_norm * gate(z).
 * A sequence's state lies in its span's keys: S at matrices_offset_bytes as [value_heads, value_dim/16, key_dim, 16],
 * the conv_width - 1 last tokens' q, k, v before the convolution at columns_offset_bytes, the oldest first, all f32; at
 * start 0 it is zero, whatever is there. key_dim and value_dim % 16 == 0, <= 256; conv_width <= 8. A sequence gets the
 * same bits however it is cut into calls.
 * With decays each channel of a key has a decay of its own (Kimi Delta Attention): they hold a of all channels, gates
 * hold b alone, and row i of S is multiplied by exp(-rate softplus(a_i + dt_bias_i)), or with a lower_bound by
 * exp(lower_bound sigmoid(rate (a_i + dt_bias_i))). */
typedef struct krasis_gated_delta_args {
    float *x;
    int64_t ldx, tokens, key_heads, value_heads, key_dim, value_dim, conv_width;
    float *gates;
    const float *conv;            /* [conv_width, channels of q, k, v], the oldest token's weights first */
    const float *rates, *dt_bias; /* [value_heads] */
    const float *gate_norm;       /* [value_dim] */
    float eps;                    /* of the norm */
    int32_t gate;                 /* krasis_gate */
    const krasis_span *spans;
    int64_t num_spans, matrices_offset_bytes, columns_offset_bytes;
    float *out;
    float *decays;     /* NULL; or [T, value_heads * key_dim], overwritten; then dt_bias is [value_heads * key_dim] */
    const float *z;    /* NULL: behind v in x; or [T, value_heads * value_dim] */
    float lower_bound; /* 0: none */
    int32_t reserved;
} krasis_gated_delta_args;
KRASIS_API int32_t krasis_gated_delta(krasis_pool *pool, const krasis_gated_delta_args *args);

/* A gated short convolution between its projections: out = c * conv(b * x), by channel over the last `width` tokens. x:
 * f32 [T, ldx], a row is b, c and x of all channels. A sequence's width - 1 last products b * x lie in its span's keys
 * at columns_offset_bytes, [width - 1, channels] f32, the oldest first; at start 0 they are zero, whatever is there.
 * channels % 16 == 0, width <= 8. A sequence gets the same bits however it is cut into calls. */
typedef struct krasis_short_conv_args {
    const float *x;
    int64_t ldx, tokens, channels, width;
    const float *conv; /* [width, channels], the oldest token's weights first */
    const krasis_span *spans;
    int64_t num_spans, columns_offset_bytes;
    float *out; /* [T, channels] */
} krasis_short_conv_args;
KRASIS_API int32_t krasis_short_conv(krasis_pool *pool, const krasis_short_conv_args *args);

/* A Mamba-2 scan between its projections. x: f32 [T, ldx], a row is z [heads, head_dim], x of the same, B and C
 * [groups, state_dim]; overwritten. steps: f32 [T, heads]; overwritten. Then: x, B and C are convolved by channel over
 * the last conv_width tokens, += conv_bias, and silu; a step is d = max(softplus(step + dt_bias), min_step). Of each
 * head, with B and C of group head / (heads / groups) and a matrix S [state_dim, head_dim]: S = exp(-rate d) S + B (d
 * x)^T; o = S^T C + skip x. out: f32 [T, heads * head_dim] = h / rms(h) * gate_norm, h = o silu(z), rms by group.
 * A sequence's state lies in its span's keys as that of krasis_gated_delta, S as [heads, head_dim/16, state_dim, 16].
 * head_dim and state_dim % 16 == 0, <= 1024; conv_width <= 8. A sequence gets the same bits however it is cut into
 * calls. */
typedef struct krasis_mamba2_args {
    float *x;
    int64_t ldx, tokens, heads, head_dim, state_dim, groups, conv_width;
    float *steps;
    const float *conv;                   /* [conv_width, channels of x, B, C], the oldest token's weights first */
    const float *conv_bias;              /* [channels] or NULL */
    const float *rates, *dt_bias, *skip; /* [heads] */
    const float *gate_norm;              /* [heads * head_dim] */
    float eps;                           /* of the norm */
    float min_step;
    const krasis_span *spans;
    int64_t num_spans, matrices_offset_bytes, columns_offset_bytes;
    float *out;
} krasis_mamba2_args;
KRASIS_API int32_t krasis_mamba2(krasis_pool *pool, const krasis_mamba2_args *args);

/* x[t] *= gate(g[t]), both f32 [T, k]. k % 16 == 0. */
KRASIS_API int32_t krasis_gate_rows(krasis_pool *pool, float *x, const float *g, int64_t tokens, int64_t k,
                                    int32_t gate);

/* ---- flags ------------------------------------------------------------------------------------------------
 * The CPU's side of handing work to and fro with a GPU: words in memory both can address, which only ever grow. wait
 * spins until *flag >= value (an acquire: what was written before the flag can be read), after a while giving other
 * threads the CPU between looks; KRASIS_ERR_TIMEOUT after timeout_ns. store is a release. flag is a multiple of 8. */
KRASIS_API int32_t krasis_wait_flag(const uint64_t *flag, uint64_t value, int64_t timeout_ns);
KRASIS_API int32_t krasis_store_flag(uint64_t *flag, uint64_t value);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_H */
