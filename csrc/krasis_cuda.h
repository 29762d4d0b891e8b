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
#include "krasis_cuda_delta.h"
#include "krasis_cuda_index.h"
#include "krasis_cuda_latent.h"
#include "krasis_cuda_route.h"
#include "krasis_cuda_streams.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KRASIS_CUDA_ABI_VERSION 6
#define KRASIS_ERR_CUDA 100 /* a CUDA call failed */

KRASIS_API int32_t krasis_cuda_abi_version(void);
/* The words of the last KRASIS_ERR_CUDA of this thread; empty if there was none. */
KRASIS_API const char *krasis_cuda_last_error(void);

/* ---- the grouped product ------------------------------------------------------------------------------------------
 * For every slot s of experts [expert_begin, expert_end):  out[s] = activations[s / slots_per_row] x W_e,
 * W_e [k, n] in Marlin layout, 4 bits, at expert_base[e] + codes_offset, its scales at expert_base[e] + scales_offset.
 * gated: n = 2 * intermediate, columns gate then up, and out[s] = activation(gate, up) has intermediate columns; with
 * biases, those are added first. Not gated, KRASIS_CUDA_RELU_SQUARED makes out relu(.)^2, after a bias.
 * scale_dtype KRASIS_CUDA_E8M0: MXFP4: codes are E2M1, scales bytes e for 2^(e - 127) of groups of 32. Weights are then
 * exact in bf16 for scales from 2^-62 to 2^65, in fp16 from 2^-19 to 2^5 (larger ones count as 2^5).
 * Sums and scales are fp32; out is rounded once. An expert whose expert_base is null is computed elsewhere: skipped.
 * k % 64 == 0; n % 64 == 0 (gated: n % 128 == 0); all addresses and strides multiples of 16 bytes.
 * ids: [num_slots], with m_block 16 and up to 64 slots: the expert of each slot, instead of krasis_cuda_moe_align's
 * sorting, which then need not have run: the same bits, and an expert's weights are read once a slot. With hidden (not
 * gated, out 16-bit), hidden[t] += the sum of slot_weights[t, j] * out[t, j] over the slots of experts below
 * expert_end, as krasis_cuda_moe_reduce adds: every such expert must have been computed. */
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
    int32_t activation;    /* gated: KRASIS_CUDA_SILU (0) or another; else 0: none, or KRASIS_CUDA_RELU_SQUARED */
    float limit, alpha;
    const int32_t *ids;        /* NULL: sorted_slots, block_experts and first_block count; else they may be NULL */
    const float *slot_weights; /* [num_slots] */
    float *hidden;             /* [num_slots / top_k, n]; NULL: nothing is added */
    uint32_t *arrivals;        /* [num_slots / top_k * n / 64] zeros, as which they are left */
    int64_t top_k;
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

/* One token's krasis_cuda_rms_norm, rounded to dtype, and the krasis_cuda_int8_gemm of that, in one launch with the
 * same bits. k <= KRASIS_CUDA_MAX_NORMED. */
#define KRASIS_CUDA_MAX_NORMED 16384
typedef struct krasis_cuda_norm_int8_args {
    const float *hidden; /* [k] */
    const void *norm;    /* [k] of norm_dtype */
    int64_t k, n;
    int32_t norm_dtype;
    int32_t dtype, out_dtype; /* KRASIS_BF16 or KRASIS_F16; out: dtype, or KRASIS_F32 */
    float eps;
    const int8_t *weight;
    const float *scales;
    void *out; /* [n] */
} krasis_cuda_norm_int8_args;
KRASIS_API int32_t krasis_cuda_norm_int8_gemv(const krasis_cuda_norm_int8_args *args, void *stream);

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
 * KRASIS_CUDA_NORM_FLAT has neither, nor heads of more than 256 channels. Addresses in rows are multiples of 16 bytes.
 *
 * Row t is at position start + t of the caches [num_kv_heads, capacity, head_dim] k_cache and v_cache, unless rows says
 * otherwise: then the caches are at rows[t].keys + keys_offset and rows[t].values + values_offset (in bytes).
 *
 * kv_dtype KRASIS_I8: caches hold int8 codes, and right behind them float32 scales [num_kv_heads, capacity]: a row's
 * absmax / 127, codes rounded to nearest even, as on the CPU. What is no number is in the scale.
 *
 * ring: caches (and scales) have so many places a head in place of capacity, position p lies at p % ring; capacity
 * still bounds positions. Without rows at most ring tokens. */
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
    int32_t kv_dtype; /* KRASIS_I8; or 0: dtype */
    int32_t reserved;
    int64_t ring; /* 0: none */
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

/* ---- decode ------------------------------------------------------------------------------------------------------
 * Attention of num_rows queries, each over its own cache's positions up to its own (its own included; with a window
 * the last `window` of these), softmax in fp32, keys split over blocks and combined in a fixed order. Positions and
 * caches are read from device memory when the kernel runs: of rows, as in krasis_cuda_qkv_args, or, where rows is NULL,
 * those of one query. A row has the same bits whatever other rows there are. sinks: one more logit of each head in its
 * softmax, without a value. head_dim % 16 == 0, <= 512. kv_dtype, ring: as in krasis_cuda_qkv_args; a ring has room for
 * the window. */
typedef struct krasis_cuda_attention_args {
    const void *q;                 /* [num_rows, num_heads, head_dim] of dtype, rows q_stride elements apart */
    const void *k_cache, *v_cache; /* [num_kv_heads, capacity, head_dim] of kv_dtype; not looked at with rows */
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
    int32_t kv_dtype;             /* KRASIS_I8; or 0: dtype */
    int32_t reserved;
    int64_t ring; /* 0: none */
} krasis_cuda_attention_args;
KRASIS_API int64_t krasis_cuda_attention_workspace_bytes(int64_t num_rows, int64_t num_heads, int64_t head_dim,
                                                         int64_t capacity);
KRASIS_API int32_t krasis_cuda_attention_decode(const krasis_cuda_attention_args *args, void *stream);

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

/* One launch that waits as receive does and then takes rows that another GPU of the host sent to pinned memory: x =
 * them in dtype; own_ids = the ids of which held is not 0, -1 elsewhere; own_weights = weights; counts, if not null,
 * grow by how often each expert was chosen. If it gave up, own_ids are all -1, own_weights 0 and x stays. columns % 8
 * == 0. */
typedef struct krasis_cuda_take_args {
    const uint64_t *flag;
    const uint64_t *epoch;
    int64_t timeout_ns;
    uint64_t *timeouts;   /* [1] */
    uint64_t tag;         /* not 0 */
    const float *normed;  /* [rows, columns] pinned host memory */
    const int32_t *ids;   /* [rows, top_k] pinned host memory; less than 0: none */
    const float *weights; /* [rows, top_k] pinned host memory */
    const uint8_t *held;  /* [num_experts] */
    int64_t rows;
    int64_t columns;
    int64_t top_k;
    int32_t num_experts;
    int32_t dtype; /* BF16 or F16 */
    void *x;       /* [rows, columns] of dtype */
    int32_t *own_ids;
    float *own_weights;
    int64_t *counts; /* [num_experts] */
    float *zeros;    /* NULL; or [rows, columns], which become 0: for sums of the rows' experts */
} krasis_cuda_take_args;
KRASIS_API int32_t krasis_cuda_take(const krasis_cuda_take_args *args, void *stream);

/* ---- many rows: weights as 16-bit floats for a library's matrix products ---- */

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
