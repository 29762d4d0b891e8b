/* krasis_pack.h: packing weights, for the converter. Part of krasis.h. */
#ifndef KRASIS_PACK_H
#define KRASIS_PACK_H

#include "krasis_pool.h"

#ifdef __cplusplus
extern "C" {
#endif

/* src is [n, k] of dtype, rows row_stride elements apart. stats may be NULL; otherwise it is ADDED to (squared_error
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

/* The same of 4 bits with scales that are given, such as a checkpoint has them: steps, float [n, k/group], finite.
 * A scale is stored as scale_dtype holds it (1 where every code is zero), a code is round(weight / scale): weights that
 * are -8..7 whole steps of scales that scale_dtype holds lose nothing. */
KRASIS_API int32_t krasis_pack_marlin_steps(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                            int64_t row_stride, int64_t group, int64_t n_offset, int64_t n_total,
                                            const float *steps, uint32_t *codes, uint16_t *scales, int32_t scale_dtype,
                                            krasis_pack_stats *stats);

/* CPU tiles. Row r of src goes to row (r / part_rows) * KRASIS_TILE_ROWS + part_offset + r % part_rows of the packed
 * weight: part_rows = 32, part_offset = 0 packs a plain weight; gate and up are fused with part_rows = 16 and
 * part_offset 0 / 16; other values are refused. Two parts of one I4 weight share bytes and must not be packed at the
 * same time. dst holds n * 32 / part_rows rows in all: tile t (32 rows) is a strip of k/32 consecutive tiles. k % 32 ==
 * 0, n % part_rows == 0. Scales are f16: Q8 absmax/127 as Q8_0 does; I4 by the MSE grid, importance as above. */
KRASIS_API int32_t krasis_pack_cpu_tiles(krasis_pool *pool, int32_t tiles, const void *src, int32_t dtype, int64_t n,
                                         int64_t k, int64_t row_stride, int64_t part_rows, int64_t part_offset,
                                         const float *importance, uint8_t *dst, krasis_pack_stats *stats);

/* The same of I4 with scales that are given, see krasis_pack_marlin_steps: steps, float [n, k/32]. */
KRASIS_API int32_t krasis_pack_cpu_tiles_steps(krasis_pool *pool, const void *src, int32_t dtype, int64_t n, int64_t k,
                                               int64_t row_stride, int64_t part_rows, int64_t part_offset,
                                               const float *steps, uint8_t *dst, krasis_pack_stats *stats);

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

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_PACK_H */
