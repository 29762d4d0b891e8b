/* krasis_cuda_route.h: which experts a token meets, and which rows an expert. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_ROUTE_H
#define KRASIS_CUDA_ROUTE_H

#include "krasis_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[t, e] = x[t] . W[e], sums in fp32: for the few tokens of decode (tokens <= 8); k % 64 == 0. */
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
    const uint8_t *resident; /* [num_experts]: 1: the GPU holds the expert, 2: another GPU, 0: none; NULL: none */
    int32_t *gpu_ids;        /* out [tokens, top_k]: ids of those with 1, -1 for others; may be NULL */
    int32_t *cpu_ids;        /* out [tokens, top_k]: ids of those with 0, -1 for others; may be NULL */
    int64_t *counts;         /* [num_experts]: increased by how often each was chosen; may be NULL */
    const float *logit_bias, *correction, *expert_scale; /* [num_experts]; NULL: none */
    float logit_cap;                                     /* 0: none */
    float scale, sum_floor, sum_epsilon;                 /* 1, 0, 0 change nothing */
    int32_t groups, top_groups;                          /* 1, 1: no groups */
    int32_t group_score;                                 /* KRASIS_CUDA_GROUP_... */
    int32_t reserved;
} krasis_cuda_route_args;
KRASIS_API int32_t krasis_cuda_route(const krasis_cuda_route_args *args, void *stream);

/* One token's krasis_cuda_rms_norm, and the krasis_cuda_router and krasis_cuda_route of that, in one launch with the
 * same bits. Not where groups are chosen (top_groups < groups). route.logits is written. k % 64 == 0; k and twice
 * num_experts together at most 12256. */
typedef struct krasis_cuda_norm_route_args {
    const float *hidden; /* [k] */
    const void *norm;    /* [k] of norm_dtype */
    void *x;             /* out [k] of x_dtype: the normed token; NULL: not wanted */
    float *normed;       /* out [k]: likewise */
    const void *weight;  /* [num_experts, k] of weight_dtype */
    int64_t k;
    int32_t norm_dtype, x_dtype, weight_dtype;
    float eps;
    uint32_t *arrivals; /* [1] zero, as which it is left */
    krasis_cuda_route_args route;
} krasis_cuda_norm_route_args;
KRASIS_API int32_t krasis_cuda_norm_route(const krasis_cuda_norm_route_args *args, void *stream);

/* Sorts slots by expert, in slot order within one, each expert padded to whole blocks of m_block rows. The number of
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

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_ROUTE_H */
