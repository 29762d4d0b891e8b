// bench_latent.h: attention over latents, and the products of heads around it.
#pragma once

#include "bench_tools.h"

namespace bench {

// rows of one sequence, the last at the last key. Caches of several layers in turn, so that the L2 cache does not hold
// what is read. splits: as runtime/planning/latent_workspace.py has them.
inline void bench_latent_attention(const char *name, int64_t heads, int64_t rank, int64_t rows, int64_t keys) {
    constexpr int64_t kRope = 64;
    const int64_t cache_bytes = keys * (rank + kRope) * 2;
    const int64_t copies = std::clamp<int64_t>((int64_t{256} << 20) / cache_bytes, 1, 24);
    const int64_t tiles = (rows * heads + 31) / 32;
    const int64_t splits = std::clamp<int64_t>(256 / tiles, 1, std::min<int64_t>(128, (keys + 31) / 32));
    const int64_t workspace_bytes =
        std::max<int64_t>(16, krasis_cuda_latent_workspace_bytes(rows, heads, rank, splits));
    Buffer cache(copies * cache_bytes, kValueKeep, kValueSet), workspace(workspace_bytes, 0, 0);
    Buffer queries(rows * heads * rank * 2, kValueKeep, kValueSet), out(rows * heads * rank * 2, 0, 0);
    Buffer rest(rows * heads * kRope * 2, kValueKeep, kValueSet);
    int64_t turn = 0;
    krasis_cuda_latent_attention_args a{};
    a.q_latent = queries.data();
    a.q_rope = rest.data();
    a.out = out.data();
    a.q_stride = heads * kRope;
    a.q_head_stride = kRope;
    a.num_rows = rows;
    a.num_heads = heads;
    a.kv_rank = rank;
    a.rope_dim = kRope;
    a.capacity = keys;
    a.start = keys - rows;
    a.splits = splits;
    a.workspace = workspace.data();
    a.workspace_bytes = workspace_bytes;
    a.dtype = KRASIS_BF16;
    a.scale = 0.01f;
    const double seconds = median_seconds([&] {
        a.cache = cache.data() + turn++ % copies * cache_bytes;
        CHECK_OK(krasis_cuda_latent_attention(&a, stream()));
    });
    const double flops = 2.0 * static_cast<double>(rows * heads * keys * (2 * rank + kRope)) / seconds;
    std::printf("latent %-8s %3lld heads x %3lld rows, %6lld keys: %8.1f us, %5.0f GB/s, %6.1f TFLOP/s\n", name,
                static_cast<long long>(heads), static_cast<long long>(rows), static_cast<long long>(keys),
                seconds * 1e6, static_cast<double>(cache_bytes) / seconds * 1e-9, flops * 1e-12);
    std::fflush(stdout);
}

inline void bench_heads(const char *name, int64_t heads, int64_t k, int64_t n, int64_t tokens) {
    const int64_t weight_bytes = heads * n * k, copies = std::max<int64_t>(1, (int64_t{256} << 20) / weight_bytes);
    Buffer weights(copies * weight_bytes, kAnyBits, 0), scales(heads * n * 4, 0x007fffffu, 0x3c000000u);
    Buffer x(tokens * heads * k * 2, kValueKeep, kValueSet), out(tokens * heads * n * 2, 0, 0);
    int64_t turn = 0;
    krasis_cuda_int8_heads_args a{};
    a.x = x.data();
    a.x_stride = heads * k;
    a.x_head_stride = k;
    a.tokens = tokens;
    a.num_heads = heads;
    a.k = k;
    a.n = n;
    a.dtype = KRASIS_BF16;
    a.scales = reinterpret_cast<const float *>(scales.data());
    a.out = out.data();
    a.out_stride = heads * n;
    a.out_head_stride = n;
    const double seconds = median_seconds([&] {
        a.weight = reinterpret_cast<const int8_t *>(weights.data() + turn++ % copies * weight_bytes);
        CHECK_OK(krasis_cuda_int8_heads(&a, stream()));
    });
    std::printf("heads  %-8s %3lld x [%3lld, %3lld] x %2lld tokens: %7.1f us, %5.0f GB/s\n", name,
                static_cast<long long>(heads), static_cast<long long>(n), static_cast<long long>(k),
                static_cast<long long>(tokens), seconds * 1e6, static_cast<double>(weight_bytes) / seconds * 1e-9);
    std::fflush(stdout);
}

inline void bench_latent() {
    for (int64_t rows : {1, 8, 63}) {
        bench_latent_attention("v3", 128, 512, rows, 2048);
        bench_latent_attention("v3", 128, 512, rows, 10000);
        bench_latent_attention("flash", 20, 512, rows, 10000);
        bench_latent_attention("small-4", 32, 256, rows, 10000);
        bench_heads("v3 k_b", 128, 128, 512, rows);
        bench_heads("v3 v_b", 128, 512, 128, rows);
    }
}

}  // namespace bench
