// host_memory.cu: page-locking host memory for DMA. Only in the CUDA library: a host has nothing to register with.
//
// A registration belongs to a context, not to a copy of the runtime. This library links cudart statically, torch loads
// its own; both work in the device's primary context, so memory registered here is pinned memory for torch as well
// (its is_pinned() asks the driver). Their error queues are separate: what fails here is drained here and never
// surfaces in torch, and the reverse.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "status.h"

namespace krasis::cuda {
namespace {

constexpr uintptr_t kPage = 4096;

// Takes the error out of this runtime's queue and keeps its name and words.
int32_t drain(cudaError_t status) {
    if (status == cudaSuccess) return KRASIS_OK;
    char words[256];
    std::snprintf(words, sizeof(words), "%s: %s", cudaGetErrorName(status), cudaGetErrorString(status));
    cudaGetLastError();
    return report_cuda_error(words);
}

// Makes the primary context of this thread's device current, creating it if need be. The device is the one the caller
// chose (torch.cuda.device: the driver's current context is shared by both runtimes); a fresh thread has device 0.
cudaError_t use_primary_context() {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFree(nullptr);  // before CUDA 12, cudaSetDevice alone creates nothing
    return status;
}

// While another thread captures a graph, CUDA forbids calls like these to every thread in the default mode, and ends
// the capture. They touch no stream: experts may be registered in the background while decode is being captured.
class CaptureRelaxed {
  public:
    CaptureRelaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~CaptureRelaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    CaptureRelaxed(const CaptureRelaxed &) = delete;
    CaptureRelaxed &operator=(const CaptureRelaxed &) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

bool is_page_aligned(const void *address) { return reinterpret_cast<uintptr_t>(address) % kPage == 0; }

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_host_register(void *address, int64_t num_bytes, int32_t read_only) {
    using namespace krasis::cuda;
    if (!address || num_bytes <= 0 || !is_page_aligned(address)) return KRASIS_ERR_ARGUMENT;
    if (num_bytes % static_cast<int64_t>(kPage) != 0) return KRASIS_ERR_SHAPE;
    const CaptureRelaxed relaxed;
    if (const int32_t status = drain(use_primary_context())) return status;
    // Portable: pinned for every GPU of the process. Mapped: kernels can read it at krasis_cuda_host_device_address.
    unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
    if (read_only) flags |= cudaHostRegisterReadOnly;
    return drain(cudaHostRegister(address, static_cast<size_t>(num_bytes), flags));
}

int32_t krasis_cuda_host_unregister(void *address) {
    using namespace krasis::cuda;
    if (!address) return KRASIS_ERR_ARGUMENT;
    const CaptureRelaxed relaxed;
    if (const int32_t status = drain(use_primary_context())) return status;
    return drain(cudaHostUnregister(address));
}

int32_t krasis_cuda_host_device_address(const void *address, void **device_address) {
    using namespace krasis::cuda;
    if (!address || !device_address) return KRASIS_ERR_ARGUMENT;
    *device_address = nullptr;
    const CaptureRelaxed relaxed;
    if (const int32_t status = drain(use_primary_context())) return status;
    return drain(cudaHostGetDevicePointer(device_address, const_cast<void *>(address), 0));
}
