/* krasis_cuda_rows.h: what functions of libkrasis_cuda share about rows of several sequences. Part of krasis_cuda.h. */
#ifndef KRASIS_CUDA_ROWS_H
#define KRASIS_CUDA_ROWS_H

#include "krasis_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A row of a batch of several sequences: its position, and its sequence's keys and values (a slot's memory, of which a
 * layer has the part at an offset). A row whose position is below 0 belongs to nobody: it is left out. */
typedef struct krasis_cuda_row {
    int64_t position;
    void *keys, *values;
} krasis_cuda_row;

/* ---- keys and values in the host's memory, of one sequence in one layer ----
 *
 * Copies positions from where one row's slot has them to where another's does, all heads: of the n positions before
 * from_row->position, with a window of the last window - 1 of them, [n part / num_parts, n (part + 1) / num_parts);
 * with num_parts 0 from_row->position alone. Below 0 it is nobody's: nothing is copied. Keys lie as [num_kv_heads,
 * capacity, key_bytes], values likewise; has_scales: float32 [num_kv_heads, capacity] right behind both. Offsets,
 * key_bytes and value_bytes (0: there are no values) are multiples of 16. Either side may be pinned memory of the host.
 */
typedef struct krasis_cuda_move_args {
    const krasis_cuda_row *from_row, *to_row;
    int64_t from_keys, from_values, to_keys, to_values; /* offsets */
    int64_t num_kv_heads, capacity, key_bytes, value_bytes;
    int64_t window; /* 0: none */
    int32_t part, num_parts;
    int32_t has_scales;
    int32_t reserved;
} krasis_cuda_move_args;
KRASIS_API int32_t krasis_cuda_move_positions(const krasis_cuda_move_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_CUDA_ROWS_H */
