// simt_device.h: the shim on a GPU (sm_80 and later): thin wrappers of PTX. Their host twins are in simt_host.h.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace krasis::simt {

KRASIS_DEVICE unsigned thread_x() { return threadIdx.x; }
KRASIS_DEVICE unsigned block_x() { return blockIdx.x; }
KRASIS_DEVICE unsigned num_threads() { return blockDim.x; }
KRASIS_DEVICE unsigned num_blocks() { return gridDim.x; }

KRASIS_DEVICE uint8_t *shared_memory() {
    extern __shared__ __align__(1024) uint8_t krasis_shared_memory[];
    return krasis_shared_memory;
}

// ---- barriers and collectives: every lane of the mask must take part

KRASIS_DEVICE void sync_threads() { __syncthreads(); }

template <class T>
KRASIS_DEVICE T shuffle(T value, int source_lane) {
    return __shfl_sync(kAllLanes, value, source_lane);
}
template <class T>
KRASIS_DEVICE T shuffle_up(T value, int distance) {
    return __shfl_up_sync(kAllLanes, value, distance);
}
template <class T>
KRASIS_DEVICE T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(kAllLanes, value, lane_mask);
}
KRASIS_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }

// ---- memory

template <class T>
KRASIS_DEVICE T shared_load(const void *shared) {
    return *static_cast<const T *>(shared);
}
template <class T>
KRASIS_DEVICE void shared_store(void *shared, T value) {
    *static_cast<T *>(shared) = value;
}
KRASIS_DEVICE int32_t shared_atomic_add(int32_t *shared, int32_t value) { return atomicAdd(shared, value); }
KRASIS_DEVICE void global_atomic_add(int32_t *global, int32_t value) { atomicAdd(global, value); }
KRASIS_DEVICE void global_atomic_add(unsigned long long *global, unsigned long long value) { atomicAdd(global, value); }

// What another block of this launch wrote, behind arrive_last: not from a cache that does not know of it.
KRASIS_DEVICE float load_written(const float *global) { return __ldcg(global); }
KRASIS_DEVICE uint16_t load_written(const uint16_t *global) { return __ldcg(global); }

// Counts this block among `expected` ones; true for the last, which from then on may load_written what the others
// wrote. One thread calls it, behind a barrier after the block's own writes; the counter, 0 at first, ends as 0.
KRASIS_DEVICE bool arrive_last(uint32_t *counter, uint32_t expected) {
    __threadfence();
    const bool last = atomicInc(counter, expected - 1) == expected - 1;
    __threadfence();
    return last;
}

// Bits that are read once: past the nearest cache, and issued where they stand. Zeros if not valid.
KRASIS_DEVICE Words4 load_once(const uint8_t *global, bool valid) {
    Words4 r{};
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(r.w[0]), "+r"(r.w[1]), "+r"(r.w[2]), "+r"(r.w[3])
                 : "l"(__cvta_generic_to_global(global)), "r"(static_cast<uint32_t>(valid)));
    return r;
}
// Likewise, eight and four bytes that others will read again.
KRASIS_DEVICE Words2 load_early2(const uint8_t *global, bool valid) {
    Words2 r{};
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.global.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(r.w[0]), "+r"(r.w[1])
                 : "l"(__cvta_generic_to_global(global)), "r"(static_cast<uint32_t>(valid)));
    return r;
}
KRASIS_DEVICE uint32_t load_early1(const uint8_t *global, bool valid) {
    uint32_t r = 0;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.u32 %0, [%1]; }"
                 : "+r"(r)
                 : "l"(__cvta_generic_to_global(global)), "r"(static_cast<uint32_t>(valid)));
    return r;
}
KRASIS_DEVICE uint32_t shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts copying 16 bytes to shared memory, or clearing them if not valid (global is then not read).
KRASIS_DEVICE void cp_async16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
KRASIS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
KRASIS_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- launches that begin before the one ahead of them has ended (launch_beside): sm_90 and later

// Until then only what no launch ahead writes may be touched. Every thread calls it.
KRASIS_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Asks for bytes that no launch ahead writes, as far as the cache that all multiprocessors share, before
// wait_for_previous: where there is no such wait, nothing. By thread `thread` of num_threads, which all call it.
KRASIS_DEVICE void prefetch_before_wait(const uint8_t *global, int64_t num_bytes, int thread, int num_threads) {
#if __CUDA_ARCH__ >= 900
    constexpr int64_t kPiece = 2048;
    for (int64_t at = thread * kPiece; at < num_bytes; at += num_threads * kPiece) {
        const auto bytes = static_cast<uint32_t>(num_bytes - at < kPiece ? num_bytes - at : kPiece);
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global + at)),
                     "r"(bytes)
                     : "memory");
    }
#endif
}
// The next launch may begin, as far as there is room: it waits for the end of this one by itself.
KRASIS_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- words that the host reads and writes at the same time

// Makes what the block wrote before (behind a barrier) visible to the host, then stores.
KRASIS_DEVICE void store_release_system(uint64_t *word, uint64_t value) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
// What the host wrote before it stored the value read can be read from here on (by the block: behind a barrier).
KRASIS_DEVICE uint64_t load_acquire_system(const uint64_t *word) {
    uint64_t value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}
KRASIS_DEVICE uint64_t clock_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}
KRASIS_DEVICE void rest_ns(uint32_t duration) { asm volatile("nanosleep.u32 %0;" ::"r"(duration) : "memory"); }

// ---- tensor cores

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 name the rows of matrix i.
KRASIS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
// Each matrix transposed: lane 4i + j gets rows 2j and 2j + 1 of column i.
KRASIS_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
KRASIS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// A matrix held as ldmatrix gives it, transposed.
KRASIS_DEVICE uint32_t transpose_8x8(uint32_t own) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(own));
    return result;
}

// d [16, 8] += a [16, 16] x b [16, 8], fp32 sums.
KRASIS_DEVICE void mma(Bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KRASIS_DEVICE void mma(F16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- words

// a + b in each half. Callers keep to values where the sum is exact.
KRASIS_DEVICE uint32_t add2(F16, uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
KRASIS_DEVICE uint32_t add2(Bf16, uint32_t a, uint32_t b) {
    uint32_t sum;  // add.bf16x2 needs sm_90; a fused multiply-add with one is the same
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return sum;
}
// a * b in each half, subnormal numbers included.
KRASIS_DEVICE uint32_t mul2(F16, uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
KRASIS_DEVICE uint32_t mul2(Bf16, uint32_t a, uint32_t b) {
    uint32_t product;  // mul.bf16x2 needs sm_90; adding -0 changes nothing
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
// (a & mask) | set, in one instruction: the compiler makes two of it where both are constants.
template <uint32_t kMask, uint32_t kSet>
KRASIS_DEVICE uint32_t and_or(uint32_t a) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "n"(kMask), "r"(kSet));
    return result;
}
KRASIS_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
KRASIS_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Never part of a fused multiply-add, so that kernels whose bits are compared have the same.
KRASIS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
KRASIS_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// 1 / x to one unit in the last place.
KRASIS_DEVICE float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
// a / b where neither quotient nor reciprocal leaves the normal range: nearly always correctly rounded, in four
// instructions.
KRASIS_DEVICE float quotient(float a, float b) {
    const float inverse = reciprocal(b), guess = a * inverse;
    return __fmaf_rn(__fmaf_rn(-b, guess, a), inverse, guess);
}
KRASIS_DEVICE float round_even(float x) { return rintf(x); }
KRASIS_DEVICE float exp_float(float x) { return __expf(x); }
KRASIS_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
KRASIS_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
KRASIS_DEVICE float log1p_float(float x) { return log1pf(x); }

// ---- launching, from host code

// Whether the current device runs wgmma and the library has code for it: such code is for compute capability 9.0 alone.
inline bool has_wgmma() {
#if KRASIS_SM90A
    int device = 0, major = 0, minor = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    return known && major == 9 && minor == 0;
#else
    return false;
#endif
}

// What CUDA was once asked about a kernel, for each device: a launch should not cost a question.
class PerDevice {
  public:
    // 0 where nothing is known, and for devices past the last.
    int64_t get(int device) const { return device < kMost ? values_[device].load(std::memory_order_relaxed) : 0; }
    void set(int device, int64_t value) {
        if (device < kMost) values_[device].store(value, std::memory_order_relaxed);
    }

  private:
    static constexpr int kMost = 64;
    std::atomic<int64_t> values_[kMost] = {};
};

// Lets the kernel have more than 48 KiB of shared memory.
template <auto kKernel>
cudaError_t allow_shared(size_t shared_bytes) {
    static PerDevice allowed;
    if (shared_bytes <= 48 * 1024) return cudaSuccess;
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    const auto bytes = static_cast<int64_t>(shared_bytes);
    if (status != cudaSuccess || allowed.get(device) >= bytes) return status;
    status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status == cudaSuccess) allowed.set(device, bytes);
    return status;
}

// How many such blocks run on this GPU at once; 0, with words, if CUDA refuses. shape.blocks is not used; the rest of
// it must be the same in every call for a kernel.
template <auto kKernel>
int64_t resident_blocks(const LaunchShape &shape, const char **error) {
    static PerDevice known;
    int device = 0, multiprocessors = 0, blocks = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess && known.get(device)) return known.get(device);
    if (status == cudaSuccess) status = allow_shared<kKernel>(shape.shared_bytes);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) {
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, static_cast<int>(shape.threads),
                                                               shape.shared_bytes);
    }
    if (status == cudaSuccess && blocks == 0) status = cudaErrorLaunchOutOfResources;
    if (status != cudaSuccess) {
        *error = cudaGetErrorString(status);
        return 0;
    }
    known.set(device, int64_t{multiprocessors} * blocks);
    return int64_t{multiprocessors} * blocks;
}

template <auto kKernel, class Params>
bool launch(const LaunchShape &shape, const Params &params, void *stream, const char **error) {
    cudaError_t status = allow_shared<kKernel>(shape.shared_bytes);
    if (status == cudaSuccess) {
        kKernel<<<shape.blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
        status = cudaGetLastError();
    }
    if (status != cudaSuccess) *error = cudaGetErrorString(status);
    return status == cudaSuccess;
}

// Off: launch_beside is launch. For comparisons.
inline bool launches_beside = true;

// Whether a kernel's code on this device waits for the launch ahead of it, and the driver keeps such launches in
// graphs.
template <auto kKernel>
bool can_begin_early() {
    static PerDevice known;  // 1: no, 2: yes
    int device = 0, driver = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (known.get(device)) return known.get(device) == 2;
    cudaFuncAttributes attributes;
    const bool yes = cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040 &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     major >= 9 && cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess &&
                     attributes.ptxVersion >= 90;
    known.set(device, yes ? 2 : 1);
    return yes;
}

// As launch, but the blocks may begin as soon as those of the kernel ahead have all called let_next_begin: the kernel
// must call wait_for_previous before it touches anything that a launch ahead of it writes, or writes itself.
template <auto kKernel, class Params>
bool launch_beside(const LaunchShape &shape, const Params &params, void *stream, const char **error) {
    if (!launches_beside || !can_begin_early<kKernel>()) return launch<kKernel>(shape, params, stream, error);
    cudaError_t status = allow_shared<kKernel>(shape.shared_bytes);
    if (status == cudaSuccess) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(shape.blocks);
        config.blockDim = dim3(shape.threads);
        config.dynamicSmemBytes = shape.shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = 1;
        status = cudaLaunchKernelEx(&config, kKernel, params);
    }
    if (status != cudaSuccess) *error = cudaGetErrorString(status);
    return status == cudaSuccess;
}

}  // namespace krasis::simt

#include "simt_wgmma.h"
