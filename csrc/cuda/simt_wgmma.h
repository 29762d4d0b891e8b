// simt_wgmma.h: products of a warpgroup (sm_90a): four warps, each with 16 rows of A in its registers, times one tile
// of B in shared memory. They run behind the threads' backs: sums and fragments are left alone until they are waited
// for.
#pragma once

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRASIS_HAS_WGMMA 1
#else
#define KRASIS_HAS_WGMMA 0
#endif

namespace krasis::simt {

// Kernels that use what follows are launched only where the library was built for the device's own architecture.
KRASIS_DEVICE void missing_instruction() { asm volatile("trap;"); }

// Registers written before are what the products after it read.
KRASIS_DEVICE void wgmma_fence() {
#if KRASIS_HAS_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
KRASIS_DEVICE void wgmma_commit() {
#if KRASIS_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until at most kPending groups of this warpgroup's products are under way.
template <int kPending>
KRASIS_DEVICE void wgmma_wait() {
#if KRASIS_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// The register's value is settled here: the compiler moves no use of it across.
KRASIS_DEVICE void hold(float &value) { asm volatile("" : "+f"(value)::"memory"); }
KRASIS_DEVICE void hold(uint32_t &value) { asm volatile("" : "+r"(value)::"memory"); }

// Shared memory written by this thread so far can be read by wgmma behind the next barrier.
KRASIS_DEVICE void fence_for_wgmma() {
#if KRASIS_HAS_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A tile of rows of 128 bytes at a multiple of 1024, chunk c of row r at place c ^ r % 8; its k16-th 16 columns.
// Eight rows are 1024 bytes; layout type 1: 128-byte swizzle.
KRASIS_DEVICE uint64_t tile_descriptor(const uint8_t *tile, int k16) {
    const uint32_t low = (shared_address(tile) >> 4) + 2u * static_cast<uint32_t>(k16) + (1u << 16);
    constexpr uint32_t kHigh = 1024 >> 4 | 1u << 30;
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(kHigh));
    return descriptor;
}

// d [64, columns] += a [64, 16] x b [16, columns], b the tile's rows; fp32 sums. A warp has rows 16 (warp % 4) and on:
// a and, for each eight columns, d as in mma.
// One instruction a width; the type of its inputs is part of its name.
#define KRASIS_WGMMA_N64(TYPE)                                                                                     \
    asm volatile(                                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                \
        " "                                                                                                        \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;"                                                                   \
        "\n}\n"                                                                                                    \
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), \
          "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), \
          "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), \
          "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile_descriptor(tile, k16)));
#define KRASIS_WGMMA_N128(TYPE)                                                                                      \
    asm volatile(                                                                                                    \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                 \
        " "                                                                                                          \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                    \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                           \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                           \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                          \
        "{%64, %65, %66, %67}, %68, p, 1, 1, 0;"                                                                     \
        "\n}\n"                                                                                                      \
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),   \
          "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),   \
          "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),   \
          "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),   \
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]),   \
          "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]), \
          "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),            \
          "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]),            \
          "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]),            \
          "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile_descriptor(tile, k16)));
KRASIS_DEVICE void wgmma(Bf16, float (&d)[8][4], const uint32_t (&a)[4], const uint8_t *tile, int k16) {
#if KRASIS_HAS_WGMMA
    KRASIS_WGMMA_N64("bf16")
#else
    missing_instruction();
#endif
}
KRASIS_DEVICE void wgmma(F16, float (&d)[8][4], const uint32_t (&a)[4], const uint8_t *tile, int k16) {
#if KRASIS_HAS_WGMMA
    KRASIS_WGMMA_N64("f16")
#else
    missing_instruction();
#endif
}
KRASIS_DEVICE void wgmma(Bf16, float (&d)[16][4], const uint32_t (&a)[4], const uint8_t *tile, int k16) {
#if KRASIS_HAS_WGMMA
    KRASIS_WGMMA_N128("bf16")
#else
    missing_instruction();
#endif
}
KRASIS_DEVICE void wgmma(F16, float (&d)[16][4], const uint32_t (&a)[4], const uint8_t *tile, int k16) {
#if KRASIS_HAS_WGMMA
    KRASIS_WGMMA_N128("f16")
#else
    missing_instruction();
#endif
}
#undef KRASIS_WGMMA_N64
#undef KRASIS_WGMMA_N128

}  // namespace krasis::simt
