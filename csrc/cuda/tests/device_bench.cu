// device_bench.cu: speed of the kernels on this GPU, beside what its tensor cores do in a bare mma.sync loop and its
// memory in a copy. One line a shape. Arguments: parts (decode, experts, dense, attention, delta, latent; none: all),
// and
// --quick for fewer shapes. Correctness is krasis_test_cuda_device's part.
#include "bench_decode.h"
#include "bench_delta.h"
#include "bench_dense.h"
#include "bench_experts.h"
#include "bench_latent.h"

namespace {

bool is_wanted(const char *part, int argc, char **argv) {
    bool any = false;
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], part) == 0) return true;
        any |= argv[i][0] != '-';
    }
    return !any;
}

void bench_dense_shapes(bool quick, double peak) {
    for (int64_t tokens : {1, 4, 8, 16, 64, 128, 256, 512, 1024, 4096}) {
        if (quick && tokens != 1 && tokens != 256 && tokens != 4096) continue;
        bench::bench_dense("30b qkv", 2048, 5120, tokens, peak);
        bench::bench_dense("30b attn out", 4096, 2048, tokens, peak);
        bench::bench_dense("235b qkv", 4096, 9216, tokens, peak);
        bench::bench_dense("235b attn out", 8192, 4096, tokens, peak);
    }
    bench::bench_dense("lm_head", 2048, 151936, 1, peak);
    bench::bench_int8_unpack(9216, 4096);
    bench::bench_int8_unpack(2048, 4096);
}

void bench_attention_shapes() {
    for (bool codes : {false, true}) {
        for (int64_t keys : {1, 64, 512, 2048, 8192, 32768}) {
            bench::bench_attention("30b", 32, 4, 128, 40960, keys, codes);
            bench::bench_attention("235b", 64, 4, 128, 40960, keys, codes);
        }
        bench::bench_attention("235b", 64, 4, 128, 131072, 131072, codes);
    }
}

void bench_delta_shapes() {
    for (int64_t rows : {1, 4, 8}) bench::bench_delta("35b", 16, 32, rows, true);
    for (int64_t rows : {1, 8, 16, 64, 512, 2048, 10000}) bench::bench_delta("35b", 16, 32, rows, false);
    bench::bench_delta("397b", 16, 64, 10000, false);
}

}  // namespace

int main(int argc, char **argv) {
    bool quick = false;
    for (int i = 1; i < argc; ++i) quick |= std::strcmp(argv[i], "--quick") == 0;
    cudaDeviceProp device;
    CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
    const double peak = bench::mma_peak(device.multiProcessorCount);
    std::printf(
        "%s: %d multiprocessors, L2 %d MB, mma.sync bf16 %.1f TFLOP/s, device copy %.0f GB/s (read + written)\n",
        device.name, device.multiProcessorCount, device.l2CacheSize >> 20, peak * 1e-12, bench::copy_rate() * 1e-9);
    if (is_wanted("decode", argc, argv)) bench::bench_decode(device.multiProcessorCount);
    if (is_wanted("attention", argc, argv)) bench_attention_shapes();
    if (is_wanted("delta", argc, argv)) bench_delta_shapes();
    if (is_wanted("latent", argc, argv)) bench::bench_latent();
    if (is_wanted("dense", argc, argv)) bench_dense_shapes(quick, peak);
    if (is_wanted("experts", argc, argv)) bench::bench_experts(quick, peak);
    return test::finish("device bench");
}
