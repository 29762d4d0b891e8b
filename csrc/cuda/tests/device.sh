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
for a in $arch; do
    case $a in 90 | 90a) a=90a flags="$flags -DKRASIS_SM90A=1" ;; esac # wgmma
    flags="$flags -gencode arch=compute_$a,code=sm_$a"
done

objects=
for source in "$cuda"/*.cu; do
    name=$(basename "$source" .cu)
    nvcc $flags -c "$source" -o "$build/$name.o" &
    objects="$objects $build/$name.o"
done
tests=
for source in "$cuda"/tests/main.cpp "$cuda"/tests/test_*.cpp; do
    name=$(basename "$source" .cpp)
    [ "$name" = test_simt ] && continue # of the host shim itself
    nvcc $flags -x cu -c "$source" -o "$build/$name.o" &
    tests="$tests $build/$name.o"
done
nvcc $flags -c "$cuda/tests/device_bench.cu" -o "$build/device_bench.o" &
wait
nvcc $flags $objects $tests -o "$build/krasis_test_cuda_device"
nvcc $flags $objects "$build/device_bench.o" -o "$build/krasis_bench_cuda"
[ -n "${BUILD_ONLY:-}" ] && exit 0
"$build/krasis_test_cuda_device"
"$build/krasis_bench_cuda" "$@"
