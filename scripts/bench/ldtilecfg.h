/* GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads, so the rest is not stored
 * first: llama.cpp's AMX products then raise SIGILL. All 64 here. */
#if defined(__GNUC__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const unsigned char(*)[64])(config)) : "memory")
#endif
