/* krasis_pool.h: the library itself, the CPU, the pool of threads, NUMA. Part of krasis.h. */
#ifndef KRASIS_POOL_H
#define KRASIS_POOL_H

#include "krasis_types.h"

#ifdef __cplusplus
extern "C" {
#endif

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

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_POOL_H */
