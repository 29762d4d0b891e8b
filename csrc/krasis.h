/* krasis.h: the whole C ABI of libkrasis_cpu.
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

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KRASIS_ABI_VERSION 4

#if defined(_WIN32)
#define KRASIS_API __declspec(dllexport)
#else
#define KRASIS_API __attribute__((visibility("default")))
#endif

typedef enum krasis_status {
    KRASIS_OK = 0,
    KRASIS_ERR_ARGUMENT = 1,  /* null pointer, negative size, unknown enum value */
    KRASIS_ERR_SHAPE = 2,     /* a size is not a multiple of the layout's tile */
    KRASIS_ERR_NONFINITE = 3, /* NaN or infinity among the weights */
    KRASIS_ERR_ISA = 4,       /* this CPU lacks the instruction set asked for */
    KRASIS_ERR_MEMORY = 5,    /* allocation failed or workspace too small */
    KRASIS_ERR_THREAD = 6,    /* a thread could not be started */
    KRASIS_ERR_SYSTEM = 7,    /* a system call failed: errno is set */
    KRASIS_ERR_RANGE = 8,     /* an index (expert id, position) is out of range */
    KRASIS_ERR_TIMEOUT = 9    /* something waited for did not come in time */
} krasis_status;

/* AMX_INT8: the kernels of AVX512_VNNI, but AMX tiles for int8 products of many rows. The bits are the same in all. */
typedef enum krasis_isa {
    KRASIS_ISA_AUTO = 0,
    KRASIS_ISA_AVX2 = 1,
    KRASIS_ISA_AVX512_VNNI = 2,
    KRASIS_ISA_AMX_INT8 = 3
} krasis_isa;

typedef enum krasis_dtype {
    KRASIS_F32 = 0,
    KRASIS_BF16 = 1,
    KRASIS_F16 = 2,
    KRASIS_I8 = 3 /* of keys and values alone: see krasis_span */
} krasis_dtype;

/* Formats of CPU weights, see formats/layouts and docs/FORMAT.md. */
typedef enum krasis_tiles {
    KRASIS_TILES_Q8 =
        0, /* cpu-q8-r32-b32: 32 rows x 32 k: int8 [8 k4][32 rows][4 k], then f16 scales [32 rows] (1088 B) */
    KRASIS_TILES_I4 = 1,   /* cpu-i4-r32-b32: 32 rows x 32 k: u8 [8 k4][16][4 k], low nibble = row j, high = row 16+j,
                              code u = q + 8; then f16 scales [32 rows] (576 B) */
    KRASIS_TILES_MXFP4 = 2 /* cpu-mxfp4-r32-b32: nibbles as in I4, each an E2M1 (sign, 2 bits of exponent, 1 of
                              mantissa); then E8M0 scales u8 [32 rows], 2^(e - 127), e <= 252 (544 B) */
} krasis_tiles;

#define KRASIS_TILE_ROWS 32
#define KRASIS_BLOCK_K 32
#define KRASIS_Q8_TILE_BYTES 1088
#define KRASIS_I4_TILE_BYTES 576
#define KRASIS_MXFP4_TILE_BYTES 544

/* ---- library, CPU, pool -------------------------------------------------------------------------------- */

typedef struct krasis_cpu_info {
    int32_t has_avx2, has_fma, has_f16c, has_avx512f, has_avx512bw, has_avx512vl, has_avx512_vnni, has_avx_vnni,
        has_avx512_bf16, has_amx_int8;
    int32_t num_logical_cpus; /* that this process may run on (affinity mask) */
    int32_t num_numa_nodes;
    int64_t l2_bytes, l3_bytes; /* 0 if unknown */
    char brand[64];
} krasis_cpu_info;

typedef struct krasis_pool krasis_pool;

KRASIS_API int32_t krasis_abi_version(void);
KRASIS_API const char *krasis_status_name(int32_t status);
KRASIS_API int32_t krasis_cpu_probe(krasis_cpu_info *info);
/* Asks the operating system for AMX tiles. 0: this process may use them; else an errno, ENODEV if the CPU has none. */
KRASIS_API int32_t krasis_amx_declined(void);

/* num_threads counts the calling thread; 0 = all CPUs of the affinity mask. On a machine with several NUMA nodes the
 * pool's own threads are bound to nodes, in proportion to their CPUs, and take a node's own rows of a weight first. */
KRASIS_API int32_t krasis_pool_create(int32_t num_threads, int32_t isa, krasis_pool **pool);
KRASIS_API void krasis_pool_destroy(krasis_pool *pool);
KRASIS_API int32_t krasis_pool_num_threads(const krasis_pool *pool);
KRASIS_API int32_t krasis_pool_isa(const krasis_pool *pool);     /* of its vectors: AVX2 or AVX512_VNNI */
KRASIS_API int32_t krasis_pool_has_amx(const krasis_pool *pool); /* 1 if its isa is AMX_INT8, else 0 */
/* For finding where the threads' time goes. Between time_start and time_end, which give it to one caller at a time,
 * jobs note what they took; noting costs a piece about 50 ns. Starting again begins anew. */
typedef struct krasis_pool_times {
    int64_t num_jobs, num_phases, num_pieces;
    double job_s;             /* of all jobs, as their callers wait for them */
    double first_phases_s[4]; /* work of all threads in a job's phases 0, 1, 2 and all later ones */
} krasis_pool_times;
KRASIS_API int32_t krasis_pool_time_start(krasis_pool *pool);
/* busy_s: of each thread, [num_threads]. The rest of job_s it waited: for the others, for work, or to be run. */
KRASIS_API int32_t krasis_pool_time_end(krasis_pool *pool, krasis_pool_times *times, double *busy_s);
/* How long idle threads look for work before they sleep: 40000 at first; at most 1e9. For callers that take turns with
 * a GPU: waking sleepers costs tens of microseconds. A pool with more threads than CPUs never spins. */
KRASIS_API int32_t krasis_pool_set_spin(krasis_pool *pool, int64_t spin_ns);

/* ---- NUMA ------------------------------------------------------------------------------------------------ */

typedef struct krasis_numa_cpu {
    int32_t cpu;
    int32_t node; /* 0, 1, ...: counts the nodes that have CPUs in the affinity mask */
    int32_t id;   /* the kernel's number of that node */
} krasis_numa_cpu;

/* The CPUs of the affinity mask, node by node. *count: how many there are; no more than capacity are written. All are
 * of one node where the system does not tell. */
KRASIS_API int32_t krasis_numa_cpus(int64_t capacity, krasis_numa_cpu *cpus, int64_t *count);
/* Rows are split by node: of a run of `units` units, node i of n owns those from first_unit(units, n, i) to
 * first_unit(units, n, i + 1). The runs are: w13 of an expert, units of 64 rows, nodes in order; w2 of an expert, units
 * of 32 rows, nodes in reverse order; a weight in int8 rows, units of 32 rows, nodes in order. -1 for impossible
 * arguments. */
KRASIS_API int64_t krasis_numa_first_unit(int64_t units, int64_t num_nodes, int64_t node);
/* The kernel's number of the node each page lies on; a negative errno for a page that is not in memory or not mapped.
 */
KRASIS_API int32_t krasis_numa_page_nodes(const void *const *addresses, int64_t count, int32_t *ids);
/* Whether reading a huge page of a mapped file brings in that page alone, and not the next one too, which would then
 * lie on the reader's node whoever owns it. Without huge pages nothing changes: reading would be page by page. */
KRASIS_API int32_t krasis_numa_read_exactly(void *address, int64_t bytes, int32_t exactly);

/* ---- files and memory ---------------------------------------------------------------------------------- */

/* Maps a whole file read-only and shared at an address that is a multiple of alignment_bytes (a power of two, >= 4096),
 * with MADV_HUGEPAGE. bytes is the file's size; the mapping must be released with krasis_unmap_file(address, bytes). */
KRASIS_API int32_t krasis_map_file(int32_t fd, int64_t bytes, int64_t alignment_bytes, void **address);
KRASIS_API int32_t krasis_unmap_file(void *address, int64_t bytes);
/* Brings a mapped range into memory (MADV_POPULATE_READ, else touching); blocks; safe from any thread. */
KRASIS_API int32_t krasis_prefault(const void *address, int64_t bytes);
/* Moves the whole 2 MiB pieces of a mapped range into huge pages (MADV_COLLAPSE, Linux 6.1); blocks; others may read
 * the range meanwhile. *declined: 0, or the errno with which the kernel declined, EINVAL if it never does that for such
 * memory; some pieces may lie in huge pages all the same. */
KRASIS_API int32_t krasis_collapse(const void *address, int64_t bytes, int32_t *declined);
/* A page of a mapped file that was cut short, or that its disk does not give, raises SIGBUS in whatever thread reads
 * it. install: for whole programs, not for libraries; the first call counts. From then on such a fault inside a mapping
 * that was added writes prefix, the mapping's name and the text cut (unreadable, if path still leads to the file in its
 * old size) as one line to standard error and ends the process at once with that code; every other SIGBUS goes where it
 * went before. add: path is looked up when it happens and should be absolute; texts are copied. remove: before the
 * mapping is released; KRASIS_ERR_RANGE if none was added there. Both are safe from any thread. */
KRASIS_API int32_t krasis_guard_install(const char *prefix, const char *cut, int32_t cut_code, const char *unreadable,
                                        int32_t unreadable_code);
KRASIS_API int32_t krasis_guard_add(const void *address, int64_t bytes, int32_t fd, const char *path, const char *name);
KRASIS_API int32_t krasis_guard_remove(const void *address);
/* Reads the range once with all threads of the pool and returns the seconds: the ceiling for decode. */
KRASIS_API int32_t krasis_read_bandwidth(krasis_pool *pool, const void *address, int64_t bytes, double *seconds);

/* ---- packing (converter) --------------------------------------------------------------------------------
 * src is [n, k] of dtype, rows row_stride elements apart. stats may be NULL; otherwise it is ADDED to (squared_error
 * against src after dequantisation). On KRASIS_ERR_NONFINITE stats->nonfinite_row names the first bad row of src. */

typedef struct krasis_pack_stats {
    double squared_error, squared_sum;
    double max_abs_error;
    int64_t count;
    int64_t nonfinite_row; /* -1: none */
} krasis_pack_stats;

/* Marlin, bits 4 or 8, written into columns [n_offset, n_offset + n) of a weight of n_total columns.
 * codes: uint32 [k/16, n_total*bits/2] (4 bits: 2*n_total words a row; 8 bits: 4*n_total). scales: 16-bit floats of
 * scale_dtype (BF16 or F16), [k/group, n_total], permuted as Marlin wants. group: 32, 64, 128, or k (one scale a
 * channel). k % 16 == 0, n % 64 == 0, n_offset % 64 == 0, k % group == 0. importance: NULL or float [k], weights of the
 * squared error. 4 bits: scale by an MSE grid over magnitude and both signs; codes u = q + 8. 8 bits: absmax/127, u = q
 * + 128. */
KRASIS_API int32_t krasis_pack_marlin(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                      int64_t row_stride, int32_t bits, int64_t group, int64_t n_offset,
                                      int64_t n_total, const float *importance, uint32_t *codes, uint16_t *scales,
                                      int32_t scale_dtype, krasis_pack_stats *stats);

/* CPU tiles. Row r of src goes to row (r / part_rows) * KRASIS_TILE_ROWS + part_offset + r % part_rows of the packed
 * weight: part_rows = 32, part_offset = 0 packs a plain weight; gate and up are fused with part_rows = 16 and
 * part_offset 0 / 16; other values are refused. Two parts of one I4 weight share bytes and must not be packed at the
 * same time. dst holds n * 32 / part_rows rows in all: tile t (32 rows) is a strip of k/32 consecutive tiles. k % 32 ==
 * 0, n % part_rows == 0. Scales are f16: Q8 absmax/127 as Q8_0 does; I4 by the MSE grid, importance as above. */
KRASIS_API int32_t krasis_pack_cpu_tiles(krasis_pool *pool, int32_t tiles, const void *src, int32_t dtype, int64_t n,
                                         int64_t k, int64_t row_stride, int64_t part_rows, int64_t part_offset,
                                         const float *importance, uint8_t *dst, krasis_pack_stats *stats);

/* Lossless: src is ggml Q8_0, [n, k/32] blocks of {f16 scale; int8 q[32]} (34 B), rows contiguous. Refuses non-finite
 * scales. */
KRASIS_API int32_t krasis_pack_cpu_tiles_from_q8_0(krasis_pool *pool, const void *src, int64_t n, int64_t k,
                                                   int64_t part_rows, int64_t part_offset, uint8_t *dst,
                                                   krasis_pack_stats *stats);

/* Lossless: src is ggml MXFP4, [n, k/32] blocks of {E8M0 scale; u8 [16], byte j = elements j (low) and j + 16} (17 B),
 * rows contiguous. Refuses scales above 252, whose weights float32 cannot all hold. As with I4, two parts of one weight
 * must not be packed at the same time. */
KRASIS_API int32_t krasis_pack_cpu_tiles_from_mxfp4(krasis_pool *pool, const void *src, int64_t n, int64_t k,
                                                    int64_t part_rows, int64_t part_offset, uint8_t *dst,
                                                    krasis_pack_stats *stats);

/* The same blocks as a Marlin weight of E2M1 codes, written as krasis_pack_marlin does 4 bits: code of element (k, n)
 * in place of u; scales: bytes [k/32, n_total], permuted as 16-bit scales are. k % 64 == 0. Refuses scales above 192,
 * which the GPU's bf16 has no room for. */
KRASIS_API int32_t krasis_pack_marlin_from_mxfp4(krasis_pool *pool, const void *src, int64_t n, int64_t k,
                                                 int64_t n_offset, int64_t n_total, uint32_t *codes, uint8_t *scales,
                                                 krasis_pack_stats *stats);

/* INT8 rows (dense weights): dst int8 [n/32, k/4, 32, 4], scales f32 [n] = absmax/127. n % 32 == 0, k % 32 == 0.
 * dst and scales point at the first row of this part: a fused weight is packed part by part at 32-row boundaries. */
KRASIS_API int32_t krasis_pack_int8_rows(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                         int64_t row_stride, int8_t *dst, float *scales, krasis_pack_stats *stats);

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
    KRASIS_ACT_RELU_SQUARED = 5         /* relu(u)^2, without a gate: not for krasis_moe */
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
 * blob: [E, expert_stride_bytes]; within an expert w13 tiles (2*intermediate rows x hidden, gate/up interleaved by 16),
 * then w2 tiles (hidden rows x intermediate). An id of -1 is skipped. Terms are added in the order j = 0..top_k-1.
 * The intermediate is quantised to int8 per 32 again. *executed (may be NULL) is increased by the number of (token,
 * expert) pairs computed. workspace: krasis_moe_workspace_bytes(...) bytes, 64-byte aligned. */
typedef struct krasis_moe_args {
    const uint8_t *blob;
    int64_t expert_stride_bytes;
    int32_t tiles;      /* krasis_tiles */
    int32_t activation; /* krasis_activation, with a gate */
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

/* A gate on what a mixer gives. */
typedef enum krasis_gate { KRASIS_GATE_SILU = 0, KRASIS_GATE_SIGMOID = 1 } krasis_gate;

/* The gated delta rule with one decay a head, between its projections. x: f32 [T, ldx], a row is q and k of each key
 * head, v and z of each value head; overwritten. gates: f32 [T, 2 * value_heads], b and a; overwritten. Then:
 * q, k and v are convolved by channel over the last conv_width tokens, and silu; q and k are brought to length 1 (1e-6
 * is added in the root), q times key_dim^-1/2. Of each value head, with q and k of key head h / (value_heads /
 * key_heads) and a matrix S [key_dim, value_dim]: S *= exp(-rate softplus(a + dt_bias)); S += k (sigmoid(b) (v - S^T
 * k))^T; o = S^T q. out: f32 [T, value_heads * value_dim] = o / rms(o) * gate_norm * gate(z).
 * A sequence's state lies in its span's keys: S at matrices_offset_bytes as [value_heads, value_dim/16, key_dim, 16],
 * the conv_width - 1 last tokens' q, k, v before the convolution at columns_offset_bytes, the oldest first, all f32; at
 * start 0 it is zero, whatever is there. key_dim and value_dim % 16 == 0, <= 256; conv_width <= 8. A sequence gets the
 * same bits however it is cut into calls. */
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
} krasis_gated_delta_args;
KRASIS_API int32_t krasis_gated_delta(krasis_pool *pool, const krasis_gated_delta_args *args);

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
