// status.h: how the entry points check arguments and launch kernels.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

// Keeps CUDA's words for krasis_cuda_last_error.
int32_t report_cuda_error(const char *words);

template <auto kKernel, class Params>
int32_t launch(const simt::LaunchShape &shape, const Params &params, void *stream) {
    if (shape.blocks == 0) return KRASIS_OK;
    const char *error = nullptr;
    return simt::launch<kKernel>(shape, params, stream, &error) ? KRASIS_OK : report_cuda_error(error);
}

// For kernels of decode, which come one after another and are short: see simt::launch_beside.
template <auto kKernel, class Params>
int32_t launch_beside(const simt::LaunchShape &shape, const Params &params, void *stream) {
    if (shape.blocks == 0) return KRASIS_OK;
    const char *error = nullptr;
    return simt::launch_beside<kKernel>(shape, params, stream, &error) ? KRASIS_OK : report_cuda_error(error);
}

// Beside the launch ahead where there are as few rows as in decode.
template <auto kKernel, class Params>
int32_t launch_rows(int64_t rows, const simt::LaunchShape &shape, const Params &params, void *stream) {
    constexpr int64_t kDecodeRows = 16;
    return rows <= kDecodeRows ? launch_beside<kKernel>(shape, params, stream) : launch<kKernel>(shape, params, stream);
}

inline bool is_16_bit(int32_t dtype) { return dtype == KRASIS_BF16 || dtype == KRASIS_F16; }
inline bool is_dtype(int32_t dtype) { return dtype == KRASIS_F32 || is_16_bit(dtype); }

// Vector accesses are 16 bytes.
inline bool is_aligned(const void *address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid, along x

}  // namespace krasis::cuda
