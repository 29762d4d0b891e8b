// bench_dense.h: products with int8 rows, native and unpacked, and attention of one query.
#pragma once

#include "bench_tools.h"

namespace bench {

// Dense int8 product. The weight is repeated until it exceeds any L2 cache, and the copies are used in turn.
inline void bench_dense(const char *name, int64_t k, int64_t n, int64_t tokens, double peak) {
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
        CHECK_OK(krasis_cuda_int8_gemm(&a, stream()));
    });
    const double flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(n * k) / seconds;
    std::printf("%-16s [%6lld, %4lld] x %4lld tokens: %8.1f us, %6.1f TFLOP/s = %4.1f %% of mma.sync, %5.0f GB/s\n",
                name, static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(tokens),
                seconds * 1e6, flops * 1e-12, 100 * flops / peak, static_cast<double>(n * k) / seconds * 1e-9);
    std::fflush(stdout);
}

inline void bench_int8_unpack(int64_t n, int64_t k) {
    const int64_t copies = std::max<int64_t>(1, (int64_t{256} << 20) / (n * k));
    Buffer weights(copies * n * k, kAnyBits, 0), scales(n * 4, 0x007fffffu, 0x3c000000u), out(n * k * 2, 0, 0);
    int64_t turn = 0;
    const double seconds = median_seconds([&] {
        const auto *codes = reinterpret_cast<const int8_t *>(weights.data() + turn++ % copies * n * k);
        CHECK_OK(krasis_cuda_int8_dequant(codes, reinterpret_cast<const float *>(scales.data()), n, k, KRASIS_BF16,
                                          out.data(), stream()));
    });
    std::printf("unpack int8 [%lld, %lld]: %7.1f us, %5.0f GB/s\n", static_cast<long long>(n),
                static_cast<long long>(k), seconds * 1e6, 3.0 * static_cast<double>(n * k) / seconds * 1e-9);
}

// Caches of several layers in turn, so that the L2 cache does not hold what is read.
inline void bench_attention(const char *name, int64_t heads, int64_t kv_heads, int64_t dim, int64_t capacity,
                            int64_t keys, bool codes = false) {
    const int64_t row_bytes = codes ? dim + 4 : 2 * dim;
    const int64_t cache_bytes = kv_heads * capacity * row_bytes;
    const int64_t layers = std::max<int64_t>(1, (int64_t{256} << 20) / (2 * kv_heads * keys * row_bytes));
    const int64_t copies = std::min<int64_t>(layers, 24);
    Buffer k_cache(copies * cache_bytes, kValueKeep, kValueSet), v_cache(copies * cache_bytes, kValueKeep, kValueSet);
    Buffer q(heads * dim * 2, kValueKeep, kValueSet), out(heads * dim * 2, 0, 0);
    const int64_t workspace_bytes = krasis_cuda_attention_workspace_bytes(1, heads, dim, capacity);
    Buffer workspace(workspace_bytes, 0, 0);
    test::Array<int64_t> position(1, keys - 1);
    position.upload();
    int64_t turn = 0;
    krasis_cuda_attention_args a{};
    a.q = q.data();
    a.out = out.data();
    a.position = position.device();
    a.num_heads = heads;
    a.num_kv_heads = kv_heads;
    a.head_dim = dim;
    a.capacity = capacity;
    a.dtype = KRASIS_BF16;
    a.scale = 0.05f;
    a.workspace = workspace.data();
    a.workspace_bytes = workspace_bytes;
    a.num_rows = 1;
    a.kv_dtype = codes ? KRASIS_I8 : 0;
    const double seconds = median_seconds([&] {
        const int64_t layer = turn++ % copies;
        a.k_cache = k_cache.data() + layer * cache_bytes;
        a.v_cache = v_cache.data() + layer * cache_bytes;
        CHECK_OK(krasis_cuda_attention_decode(&a, stream()));
    });
    const double bytes = 2.0 * static_cast<double>(kv_heads * keys * row_bytes);
    std::printf("attention %-5s %s %2lld heads of %lld, %6lld keys of %6lld: %7.1f us, %5.0f GB/s\n", name,
                codes ? "int8" : "bf16", static_cast<long long>(heads), static_cast<long long>(kv_heads),
                static_cast<long long>(keys), static_cast<long long>(capacity), seconds * 1e6, bytes / seconds * 1e-9);
    std::fflush(stdout);
}

}  // namespace bench
