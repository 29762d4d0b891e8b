// array.h: memory that kernels under test see: the same host memory where they run on the host, else a device copy.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "simt.h"

namespace test {

#if KRASIS_SIMT_DEVICE
#define CHECK_CUDA(call)                                                                                \
    do {                                                                                                \
        const cudaError_t cuda_status = (call);                                                         \
        if (cuda_status != cudaSuccess) {                                                               \
            std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_status)); \
            std::exit(1);                                                                               \
        }                                                                                               \
    } while (0)
#endif

template <class T>
class Array {
  public:
    explicit Array(size_t count, T value = T{}) : host_(count, value) {
#if KRASIS_SIMT_DEVICE
        CHECK_CUDA(cudaMalloc(&device_, count * sizeof(T) + 16));
#endif
    }
    ~Array() {
#if KRASIS_SIMT_DEVICE
        cudaFree(device_);
#endif
    }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;

    T &operator[](size_t i) { return host_[i]; }
    const T &operator[](size_t i) const { return host_[i]; }
    size_t size() const { return host_.size(); }
    T *data() { return host_.data(); }
    const T *data() const { return host_.data(); }
    // Bits that are NaN in every float type.
    void poison() { std::memset(host_.data(), 0xff, size() * sizeof(T)); }

    // The address for kernels, with the host's present content.
    T *upload() {
#if KRASIS_SIMT_DEVICE
        CHECK_CUDA(cudaMemcpy(device_, host_.data(), size() * sizeof(T), cudaMemcpyHostToDevice));
        return device_;
#else
        return host_.data();
#endif
    }
    T *device() {
#if KRASIS_SIMT_DEVICE
        return device_;
#else
        return host_.data();
#endif
    }
    void download() {
#if KRASIS_SIMT_DEVICE
        CHECK_CUDA(cudaMemcpy(host_.data(), device_, size() * sizeof(T), cudaMemcpyDeviceToHost));
#endif
    }

  private:
    std::vector<T, Aligned<T>> host_;
#if KRASIS_SIMT_DEVICE
    T *device_ = nullptr;
#endif
};

// A large, mostly untouched range of addresses, for offsets that do not fit 32 bits.
class Region {
  public:
    explicit Region(size_t bytes) : bytes_(bytes) {
#if KRASIS_SIMT_DEVICE
        if (cudaMalloc(&base_, bytes) != cudaSuccess) base_ = nullptr;
        cudaGetLastError();
#else
        void *mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped != MAP_FAILED) base_ = static_cast<uint8_t *>(mapped);
#endif
    }
    ~Region() {
#if KRASIS_SIMT_DEVICE
        cudaFree(base_);
#else
        if (base_) munmap(base_, bytes_);
#endif
    }
    Region(const Region &) = delete;
    Region &operator=(const Region &) = delete;

    bool exists() const { return base_ != nullptr; }
    uint8_t *at(int64_t offset) const { return base_ + offset; }
    void put(int64_t offset, const void *data, int64_t bytes) {
#if KRASIS_SIMT_DEVICE
        CHECK_CUDA(cudaMemcpy(at(offset), data, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
#else
        std::memcpy(at(offset), data, static_cast<size_t>(bytes));
#endif
    }

  private:
    size_t bytes_;
    uint8_t *base_ = nullptr;
};

}  // namespace test

#define CHECK_OK(call)                                                                         \
    do {                                                                                       \
        const int32_t check_status = (call);                                                   \
        if (check_status != 0) {                                                               \
            std::printf("%s:%d: %s returned %d %s\n", __FILE__, __LINE__, #call, check_status, \
                        krasis_cuda_last_error());                                             \
            if (++test::failures > 20) std::exit(1);                                           \
        }                                                                                      \
    } while (0)
