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

}  // namespace krasis::simt

#include "simt_wgmma.h"
