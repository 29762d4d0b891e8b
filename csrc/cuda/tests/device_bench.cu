// device_bench.cu: speed of the grouped and the dense products on this GPU, beside what its tensor cores do in a bare
// mma.sync loop. Prints one line a shape and row count; the argument --quick keeps to a few. Correctness is
// krasis_test_cuda_device's part.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "array.h"
#include "krasis_cuda.h"
#include "simt.h"

namespace {

constexpr int kTopK = 8, kRepeats = 15, kWarmUps = 3;

__global__ void fill_kernel(uint32_t *words, int64_t count, uint32_t keep, uint32_t set) {
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

constexpr uint32_t kAnyBits = 0xffffffffu;
// bf16 of magnitude 1 to 2, any sign and fraction; scales around 1/64.
constexpr uint32_t kValueKeep = 0x807f807fu, kValueSet = 0x3f803f80u, kScaleSet = 0x3c803c80u;

template <class Run>
double median_seconds(Run &&run) {
    cudaEvent_t begin, end;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kWarmUps + kRepeats; ++i) {
        CHECK_CUDA(cudaEventRecord(begin));
        run();
        CHECK_CUDA(cudaEventRecord(end));
        CHECK_CUDA(cudaEventSynchronize(end));
        float milliseconds = 0;
        CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
        if (i >= kWarmUps) times.push_back(milliseconds);
    }
    CHECK_CUDA(cudaEventDestroy(begin));
    CHECK_CUDA(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e-3;
}

constexpr int kPeakLoops = 2000, kPeakTiles = 16;

__global__ void __launch_bounds__(256, 1) peak_kernel(float *out, uint32_t seed) {
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

double mma_peak(int multiprocessors) {
    Buffer out(256, 0, 0);
    const double seconds = median_seconds(
        [&] { peak_kernel<<<multiprocessors, 256>>>(reinterpret_cast<float *>(out.data()), 0x9e3779b9u); });
    return 2.0 * 16 * 8 * 16 * kPeakLoops * kPeakTiles * 8 * multiprocessors / seconds;
}

double copy_rate() {
    constexpr int64_t kBytes = int64_t{1} << 30;
    Buffer from(kBytes, kAnyBits, 0), to(kBytes, 0, 0);
    const double seconds =
        median_seconds([&] { CHECK_CUDA(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice)); });
    return 2.0 * kBytes / seconds;
}

struct Model {
    const char *name;
    int64_t hidden, intermediate;
};

// Slots of experts drawn so that each has `rows`, sorted by the real kernel.
struct Routing {
    int64_t num_slots;
    int32_t num_experts, m_block;
    test::Array<int32_t> ids, sorted, blocks, first, counts, invalid;

    Routing(int64_t rows, int32_t experts)
        : num_slots(rows * experts),
          num_experts(experts),
          m_block(krasis_cuda_moe_m_block(num_slots, experts)),
          ids(static_cast<size_t>(num_slots)),
          sorted(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, experts, m_block) * m_block)),
          blocks(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, experts, m_block))),
          first(static_cast<size_t>(experts) + 1),
          counts(static_cast<size_t>(experts)),
          invalid(1) {
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7 % static_cast<size_t>(experts));
        ids.upload();
    }

    void sort() {
        const krasis_cuda_align_args args{ids.device(),   num_slots,       num_experts,
                                          m_block,        sorted.device(), blocks.device(),
                                          first.device(), counts.device(), invalid.device()};
        CHECK_OK(krasis_cuda_moe_align(&args, nullptr));
    }
};

struct Product {
    const Routing &routing;
    int64_t k, n, record_bytes;
    bool gated;
    Buffer records, activations, out;
    test::Array<const void *> table;

    Product(Routing &r, int64_t num_k, int64_t num_n, bool is_gated)
        : routing(r),
          k(num_k),
          n(num_n),
          record_bytes(k * n / 2 + k / 128 * n * 2),
          gated(is_gated),
          records(record_bytes * r.num_experts, kAnyBits, 0),
          activations(r.num_slots / (gated ? kTopK : 1) * k * 2, kValueKeep, kValueSet),
          out(r.num_slots * n * 2, 0, 0),
          table(static_cast<size_t>(r.num_experts)) {
        for (int32_t e = 0; e < r.num_experts; ++e) {
            uint8_t *record = records.data() + e * record_bytes;
            table[static_cast<size_t>(e)] = record;
            fill_kernel<<<64, 256>>>(reinterpret_cast<uint32_t *>(record + k * n / 2), k / 128 * n / 2, kValueKeep,
                                     kScaleSet);
        }
        table.upload();
    }

    void run() {
        krasis_cuda_moe_gemm_args a{};
        a.activations = activations.data();
        a.activation_stride = k;
        a.slots_per_row = gated ? kTopK : 1;
        a.dtype = a.scale_dtype = a.out_dtype = KRASIS_BF16;
        a.gated = gated;
        a.expert_base = table.device();
        a.scales_offset = k * n / 2;
        a.m_block = routing.m_block;
        a.group = 128;
        a.k = k;
        a.n = n;
        a.num_slots = routing.num_slots;
        a.num_experts = a.expert_end = routing.num_experts;
        a.sorted_slots = const_cast<Routing &>(routing).sorted.device();
        a.block_experts = const_cast<Routing &>(routing).blocks.device();
        a.first_block = const_cast<Routing &>(routing).first.device();
        a.out = out.data();
        a.out_stride = gated ? n / 2 : n;
        CHECK_OK(krasis_cuda_moe_gemm(&a, nullptr));
    }

    double flops() const { return 2.0 * static_cast<double>(routing.num_slots) * static_cast<double>(k * n); }
    double weight_bytes() const { return static_cast<double>(record_bytes) * routing.num_experts; }
};

void bench(const Model &model, int64_t rows, double peak) {
    // Few experts where there are many rows, to bound the time; always more weights than fit the L2 cache.
    const int32_t experts = rows <= 256 ? 128 : 32;
    Routing routing(rows, experts);
    const double sort_s = median_seconds([&] { routing.sort(); });
    Product gate_up(routing, model.hidden, 2 * model.intermediate, true),
        down(routing, model.intermediate, model.hidden, false);
    const double gate_up_s = median_seconds([&] { gate_up.run(); }), down_s = median_seconds([&] { down.run(); });
    const double both = (gate_up.flops() + down.flops()) / (gate_up_s + down_s);
    std::printf(
        "%-12s %5lld rows x %3d experts, m_block %2d: sort %6.1f us, w13 %8.1f us %6.1f TFLOP/s %5.0f GB/s, "
        "w2 %8.1f us %6.1f TFLOP/s %5.0f GB/s, both %6.1f TFLOP/s = %4.1f %% of mma.sync\n",
        model.name, static_cast<long long>(rows), experts, routing.m_block, sort_s * 1e6, gate_up_s * 1e6,
        gate_up.flops() / gate_up_s * 1e-12, gate_up.weight_bytes() / gate_up_s * 1e-9, down_s * 1e6,
        down.flops() / down_s * 1e-12, down.weight_bytes() / down_s * 1e-9, both * 1e-12, 100 * both / peak);
    std::fflush(stdout);
}

// Dense int8 product. The weight is repeated until it exceeds any L2 cache, and the copies are used in turn.
void bench_dense(const char *name, int64_t k, int64_t n, int64_t tokens, double peak) {
    const int64_t copies = std::max<int64_t>(1, (int64_t{256} << 20) / (n * k));
    Buffer weights(copies * n * k, kAnyBits, 0), scales(n * 4, 0x007fffffu, 0x3c000000u);
    Buffer x(tokens * k * 2, kValueKeep, kValueSet), out(tokens * n * 2, 0, 0);
    int64_t turn = 0;
    const double seconds = median_seconds([&] {
        krasis_cuda_int8_gemm_args a{};
        a.x = x.data();
        a.x_stride = k;
        a.tokens = tokens;
        a.k = k;
        a.n = n;
        a.dtype = a.out_dtype = KRASIS_BF16;
        a.weight = reinterpret_cast<const int8_t *>(weights.data() + turn++ % copies * n * k);
        a.scales = reinterpret_cast<const float *>(scales.data());
        a.out = out.data();
        a.out_stride = n;
        CHECK_OK(krasis_cuda_int8_gemm(&a, nullptr));
    });
    const double flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(n * k) / seconds;
    std::printf("%-16s [%6lld, %4lld] x %4lld tokens: %8.1f us, %6.1f TFLOP/s = %4.1f %% of mma.sync, %5.0f GB/s\n",
                name, static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(tokens),
                seconds * 1e6, flops * 1e-12, 100 * flops / peak, static_cast<double>(n * k) / seconds * 1e-9);
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char **argv) {
    const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
    cudaDeviceProp device;
    CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
    const double peak = mma_peak(device.multiProcessorCount);
    std::printf(
        "%s: %d multiprocessors, L2 %d MB, mma.sync bf16 %.1f TFLOP/s, device copy %.0f GB/s (read + written)\n",
        device.name, device.multiProcessorCount, device.l2CacheSize >> 20, peak * 1e-12, copy_rate() * 1e-9);
    const Model models[] = {{"qwen3-30b", 2048, 768}, {"qwen3-235b", 4096, 1536}};
    for (const Model &model : models) {
        for (int64_t rows : {1, 16, 32, 64, 128, 256, 512, 1024, 2048}) {
            if (quick && rows != 16 && rows != 64 && rows != 512) continue;
            bench(model, rows, peak);
        }
    }
    for (int64_t tokens : {1, 8, 16, 64, 512, 4096}) {
        if (quick && tokens != 1 && tokens != 4096) continue;
        bench_dense("30b qkv", 2048, 5120, tokens, peak);
        bench_dense("30b attn out", 4096, 2048, tokens, peak);
        bench_dense("235b qkv", 4096, 9216, tokens, peak);
        bench_dense("235b attn out", 8192, 4096, tokens, peak);
    }
    bench_dense("lm_head", 2048, 151936, 1, peak);
    return test::finish("device bench");
}
