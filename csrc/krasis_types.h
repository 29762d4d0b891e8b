/* krasis_types.h: what all functions of libkrasis_cpu share: status codes, element types, tiles. Part of krasis.h. */
#ifndef KRASIS_TYPES_H
#define KRASIS_TYPES_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

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

#ifdef __cplusplus
}
#endif
#endif /* KRASIS_TYPES_H */
