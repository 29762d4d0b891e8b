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

#define KRASIS_CUDA_ABI_VERSION 2
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
 * gated: n = 2 * intermediate, columns gate then up, and out[s] = silu(gate) * up has intermediate columns.
 * Sums and scales are fp32; out is rounded once. An expert whose expert_base is null is computed elsewhere: skipped.
 * k % 64 == 0; n % 64 == 0 (gated: n % 128 == 0); all addresses and strides multiples of 16 bytes. */
typedef struct krasis_cuda_moe_gemm_args {
    const void *activations;   /* [rows, k] of dtype */
    int64_t activation_stride; /* elements */
    int64_t slots_per_row;     /* top_k where rows are tokens, 1 where they are slots */
    int32_t dtype;             /* KRASIS_BF16 or KRASIS_F16 */
    int32_t gated;
    const void *const *expert_base; /* [num_experts] device addresses */
    int64_t codes_offset, scales_offset;
    int32_t scale_dtype; /* KRASIS_BF16 or KRASIS_F16 */
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

/* As krasis_qk_norm_rope_store, with qkv and the caches of one 16-bit dtype: norms q and k head by head (NULL weights:
 * not), rotates both (halves x[:D/2], x[D/2:]) by fp32 tables [max_positions, D/2] at positions start..start+tokens-1,
 * writes q back in place and k and v to caches [num_kv_heads, capacity, head_dim]. head_dim % 16 == 0, <= 256. */
typedef struct krasis_cuda_qkv_args {
    void *qkv; /* [tokens, (num_heads + 2 * num_kv_heads) * head_dim] */
    int64_t tokens, start, num_heads, num_kv_heads, head_dim;
    const void *q_norm, *k_norm; /* [head_dim] of norm_dtype */
    int32_t dtype, norm_dtype;
    float eps;
    int32_t reserved;
    const float *cos, *sin;
    int64_t max_positions;
    void *k_cache, *v_cache;
    int64_t capacity;
    const int64_t *start_device; /* NULL: start above counts; otherwise [1], read when the kernel runs (graphs) */
} krasis_cuda_qkv_args;
KRASIS_API int32_t krasis_cuda_qk_norm_rope_store(const krasis_cuda_qkv_args *args, void *stream);

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

/* softmax over the experts in fp32, then the top_k largest in falling order (ties: lower id first), weights divided by
 * their sum if normalize != 0: what krasis_route_topk does on the CPU. num_experts <= 1024, top_k <= 64. */
typedef struct krasis_cuda_route_args {
    const float *logits; /* [tokens, num_experts] */
    int64_t tokens, num_experts, top_k;
    int32_t normalize, reserved;
    int32_t *ids;            /* out [tokens, top_k] */
    float *weights;          /* out [tokens, top_k] */
    const uint8_t *resident; /* [num_experts]: not 0 where the GPU holds the expert; NULL: none */
    int32_t *gpu_ids;        /* out [tokens, top_k]: ids of resident experts, -1 for others; may be NULL */
    int32_t *cpu_ids;        /* out [tokens, top_k]: -1 for resident experts, ids of others; may be NULL */
    int64_t *counts;         /* [num_experts]: increased by how often each was chosen; may be NULL */
} krasis_cuda_route_args;
KRASIS_API int32_t krasis_cuda_route(const krasis_cuda_route_args *args, void *stream);

/* ---- decode ------------------------------------------------------------------------------------------------------
 * Attention of one query over cache positions 0..position (its own included), softmax in fp32, keys split over blocks
 * and combined in a fixed order. The position is read from device memory when the kernel runs. head_dim % 16 == 0, <=
 * 256. */
typedef struct krasis_cuda_attention_args {
    const void *q;                 /* [num_heads, head_dim] of dtype */
    const void *k_cache, *v_cache; /* [num_kv_heads, capacity, head_dim] of dtype */
    void *out;                     /* [num_heads, head_dim] of dtype */
    const int64_t *position;       /* [1] */
    int64_t num_heads, num_kv_heads, head_dim, capacity;
    int32_t dtype; /* KRASIS_BF16 or KRASIS_F16 */
    float scale;
    void *workspace; /* krasis_cuda_attention_workspace_bytes(...) bytes */
    int64_t workspace_bytes;
} krasis_cuda_attention_args;
KRASIS_API int64_t krasis_cuda_attention_workspace_bytes(int64_t num_heads, int64_t head_dim, int64_t capacity);
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
