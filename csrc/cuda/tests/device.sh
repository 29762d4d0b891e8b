#!/bin/sh
# device.sh: builds the kernels' tests and benchmark for the GPU of this machine, or for those named in ARCH, and runs them.
#   csrc/cuda/tests/device.sh [--quick]            needs nvcc 12.4 or later; nothing is downloaded
#   ARCH="80 89 90" BUILD_ONLY=1 csrc/cuda/tests/device.sh
set -eu
cuda=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-/tmp/krasis-cuda-device}
mkdir -p "$build"
arch=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
flags="-std=c++20 -O3 -I$cuda -I$cuda/.. -I$cuda/tests"
for a in $arch; do flags="$flags -gencode arch=compute_$a,code=sm_$a"; done

objects=
for source in status marlin_moe moe_align moe_rows int8_rows attention_rows; do
    nvcc $flags -c "$cuda/$source.cu" -o "$build/$source.o" &
    objects="$objects $build/$source.o"
done
tests=
for source in main test_moe_align test_moe_gemm test_moe_rows test_int8_rows test_attention_rows; do
    nvcc $flags -x cu -c "$cuda/tests/$source.cpp" -o "$build/$source.o" &
    tests="$tests $build/$source.o"
done
nvcc $flags -c "$cuda/tests/device_bench.cu" -o "$build/device_bench.o" &
wait
nvcc $flags $objects $tests -o "$build/krasis_test_cuda_device"
nvcc $flags $objects "$build/device_bench.o" -o "$build/krasis_bench_cuda"
[ -n "${BUILD_ONLY:-}" ] && exit 0
"$build/krasis_test_cuda_device"
"$build/krasis_bench_cuda" "$@"
