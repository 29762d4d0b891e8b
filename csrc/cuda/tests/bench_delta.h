// bench_delta.h: the gated delta rule over a prompt, in chunks, and for the rows of decode.
#pragma once

#include "bench_tools.h"

namespace bench {

// One layer of heads of 128; table: each row is a sequence of its own.
inline void bench_delta(const char *name, int64_t key_heads, int64_t value_heads, int64_t tokens, bool table) {
    constexpr int64_t kDim = 128, kWidth = 4, kChunks = 32;
    const int64_t values = value_heads * kDim, channels = 2 * key_heads * kDim + values;
    const int64_t matrices = value_heads * kDim * kDim, slot = matrices + kWidth * channels;
    const int64_t slots = table ? tokens : 1;
    Buffer x(tokens * (channels + values) * 2, kValueKeep, kValueSet), mixed(tokens * channels * 2, 0, 0);
    Buffer gates(tokens * 2 * value_heads * 4, 0x807fffffu, 0x3c000000u), out(tokens * values * 2, 0, 0);
    Buffer conv(channels * kWidth * 4, 0x807fffffu, 0x3e000000u), vectors((2 * value_heads + kDim) * 4, 0, 0x3c000000u);
    Buffer state(slots * slot * 4, 0, 0), chunks(kChunks * value_heads * KRASIS_CUDA_DELTA_CHUNK_BYTES, 0, 0);
    test::Array<krasis_cuda_row> rows(static_cast<size_t>(slots));
    for (int64_t i = 0; i < slots; ++i) rows[static_cast<size_t>(i)] = {1000, state.data() + i * slot * 4, nullptr};
    krasis_cuda_gated_delta_args a{};
    a.x = x.data();
    a.gates = reinterpret_cast<float *>(gates.data());
    a.mixed = mixed.data();
    a.out = out.data();
    a.tokens = tokens;
    a.key_heads = key_heads;
    a.value_heads = value_heads;
    a.key_dim = a.value_dim = kDim;
    a.conv_width = kWidth;
    a.conv = reinterpret_cast<const float *>(conv.data());
    a.a_log = reinterpret_cast<const float *>(vectors.data());
    a.dt_bias = a.a_log + value_heads;
    a.gate_norm = a.dt_bias + value_heads;
    a.norm_dtype = KRASIS_F32;
    a.dtype = KRASIS_BF16;
    a.eps = 1e-6f;
    a.matrices = reinterpret_cast<float *>(state.data());
    a.columns = a.matrices + matrices;
    a.start = 1000;
    if (table) {
        a.rows = rows.upload();
        a.columns_offset = matrices * 4;
    } else {
        a.chunks = chunks.data();
        a.num_chunks = kChunks;
    }
    const double seconds = median_seconds([&] { CHECK_OK(krasis_cuda_gated_delta(&a, stream())); });
    std::printf("gated delta %-4s %2lld of %2lld heads x %5lld rows%s: %8.1f us, %6.1f ns a row\n", name,
                static_cast<long long>(key_heads), static_cast<long long>(value_heads), static_cast<long long>(tokens),
                table ? " of as many sequences" : "", seconds * 1e6, seconds * 1e9 / static_cast<double>(tokens));
    std::fflush(stdout);
}

}  // namespace bench
