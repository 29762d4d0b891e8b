// simt.h: one spelling of what kernels need, compiled by nvcc for a GPU and by a host compiler for tests.
//
// Kernels are functions of one parameter struct. They name threads, barriers, shared memory and tensor-core
// instructions only through this header, so the very source that runs on a GPU also runs on the host, where every
// thread is a fiber and every access to shared memory is checked for races (simt_host.h).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define KRASIS_SIMT_DEVICE 1
#define KRASIS_DEVICE __device__ __forceinline__
#define KRASIS_BOTH __host__ __device__ __forceinline__
// threads a block, and the blocks that must fit on one multiprocessor at once
#define KRASIS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KRASIS_PRAGMA(text) _Pragma(#text)
#define KRASIS_UNROLL KRASIS_PRAGMA(unroll)
#define KRASIS_UNROLL_BY(times) KRASIS_PRAGMA(unroll times)
#else
#define KRASIS_SIMT_DEVICE 0
#define KRASIS_DEVICE inline
#define KRASIS_BOTH inline
#define KRASIS_KERNEL(threads, blocks) inline void
#define KRASIS_UNROLL
#define KRASIS_UNROLL_BY(times)
#endif

// Defined as 1 where the build has code for sm_90a.
#if !defined(KRASIS_SM90A)
#define KRASIS_SM90A 0
#endif

namespace krasis::simt {

inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr int kWarp = 32;

struct LaunchShape {
    unsigned blocks;
    unsigned threads;
    size_t shared_bytes;
};

// Groups of 32-bit registers, loaded and stored as one access.
struct alignas(8) Words2 {
    uint32_t w[2];
};
struct alignas(16) Words4 {
    uint32_t w[4];
};

}  // namespace krasis::simt

#include "numeric.h"
#if KRASIS_SIMT_DEVICE
#include "simt_device.h"
#else
#include "simt_host.h"
#endif

namespace krasis::simt {

// What a kernel begins with that is launched beside the one ahead of it and has nothing to do before that one's end.
KRASIS_DEVICE void follow() {
    let_next_begin();
    wait_for_previous();
}

}  // namespace krasis::simt
