// bench_tools.h: what all benchmarks on a GPU share: filled buffers, timing, and the device's own limits.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "array.h"
#include "krasis_cuda.h"
#include "simt.h"

namespace bench {

inline constexpr int kTopK = 8, kRepeats = 15, kWarmUps = 3;

static __global__ void fill_kernel(uint32_t *words, int64_t count, uint32_t keep, uint32_t set) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        uint32_t z = static_cast<uint32_t>(i) * 2654435761u + static_cast<uint32_t>(i >> 32) + 77u;
        z = (z ^ (z >> 16)) * 0x7feb352du;
        z = (z ^ (z >> 15)) * 0x846ca68bu;
        words[i] = ((z ^ (z >> 16)) & keep) | set;
    }
}

// Device memory filled with random bits, of which only those of `keep` vary and those of `set` are one.
class Buffer {
  public:
    Buffer(int64_t bytes, uint32_t keep, uint32_t set) {
        CHECK_CUDA(cudaMalloc(&data_, static_cast<size_t>(bytes) + 256));
        fill_kernel<<<2048, 256>>>(static_cast<uint32_t *>(data_), bytes / 4, keep, set);
        CHECK_CUDA(cudaGetLastError());
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    uint8_t *data() const { return static_cast<uint8_t *>(data_); }

  private:
    void *data_ = nullptr;
};

inline constexpr uint32_t kAnyBits = 0xffffffffu;
// bf16 of magnitude 1 to 2, any sign and fraction; scales around 1/64.
inline constexpr uint32_t kValueKeep = 0x807f807fu, kValueSet = 0x3f803f80u, kScaleSet = 0x3c803c80u;

// What the benchmarks launch on: not the default stream, which no graph can be captured from.
inline cudaStream_t stream() {
    static const cudaStream_t made = [] {
        cudaStream_t created;
        CHECK_CUDA(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
        return created;
    }();
    return made;
}

// Between two events, in seconds.
template <class Run>
double timed(Run &&run) {
    static cudaEvent_t begin = nullptr, end = nullptr;
    if (begin == nullptr) {
        CHECK_CUDA(cudaEventCreate(&begin));
        CHECK_CUDA(cudaEventCreate(&end));
    }
    CHECK_CUDA(cudaEventRecord(begin, stream()));
    run();
    CHECK_CUDA(cudaEventRecord(end, stream()));
    CHECK_CUDA(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
    return milliseconds * 1e-3;
}

// The time of one run in a captured graph of many: about a millisecond's worth, so that neither the host's launches nor
// the events count.
template <class Run>
double median_seconds(Run &&run) {
    CHECK_CUDA(cudaDeviceSynchronize());
    timed(run);
    const double once = timed(run);
    const int runs = static_cast<int>(std::clamp(1e-3 / once, 1.0, 40.0));
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK_CUDA(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < runs; ++i) run();
    CHECK_CUDA(cudaStreamEndCapture(stream(), &graph));
    CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<double> times;
    for (int i = 0; i < kWarmUps + kRepeats; ++i) {
        const double seconds = timed([&] { CHECK_CUDA(cudaGraphLaunch(replay, stream())); });
        if (i >= kWarmUps) times.push_back(seconds / runs);
    }
    CHECK_CUDA(cudaGraphExecDestroy(replay));
    CHECK_CUDA(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

inline constexpr int kPeakLoops = 2000, kPeakTiles = 16;

static __global__ void __launch_bounds__(256, 1) peak_kernel(float *out, uint32_t seed) {
    float d[kPeakTiles][4] = {};
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = (seed * (threadIdx.x + i) & kValueKeep) | kValueSet;
    for (int i = 0; i < 2; ++i) b[i] = (seed * (threadIdx.x + 9 + i) & kValueKeep) | kScaleSet;
    for (int loop = 0; loop < kPeakLoops; ++loop) {
#pragma unroll
        for (int i = 0; i < kPeakTiles; ++i) krasis::simt::mma(krasis::Bf16{}, d[i], a, b);
    }
    float sum = 0;
    for (int i = 0; i < kPeakTiles; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (sum == 12345.0f) *out = sum;
}

inline double mma_peak(int multiprocessors) {
    Buffer out(256, 0, 0);
    const double seconds = median_seconds([&] {
        peak_kernel<<<multiprocessors, 256, 0, stream()>>>(reinterpret_cast<float *>(out.data()), 0x9e3779b9u);
    });
    return 2.0 * 16 * 8 * 16 * kPeakLoops * kPeakTiles * 8 * multiprocessors / seconds;
}

inline double copy_rate() {
    constexpr int64_t kBytes = int64_t{1} << 30;
    Buffer from(kBytes, kAnyBits, 0), to(kBytes, 0, 0);
    const double seconds = median_seconds(
        [&] { CHECK_CUDA(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream())); });
    return 2.0 * kBytes / seconds;
}

}  // namespace bench
