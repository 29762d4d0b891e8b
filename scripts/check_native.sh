#!/usr/bin/env bash
# The native half of check.sh, at the lowest priority, so that it takes what the Python half leaves of the machine:
# the CUDA kernels as host C++, the native tests under the sanitizers, the CUDA kernels for real GPUs.
#   scripts/check_native.sh DONE     makes the empty file DONE as soon as the CUDA double, which the Python suite needs, is built
set -euo pipefail
cd "$(dirname "$0")/.."
renice -n 19 -p $$ >/dev/null

double_built=$1
step() { printf '\n-- %s (%s s)\n' "$1" "$SECONDS"; }

step "cmake and ninja"
tools=build/tools
[ -x "$tools/bin/ninja" ] || { "${PYTHON:-python3}" -m venv "$tools" && "$tools/bin/python" -m pip --disable-pip-version-check --quiet install cmake ninja; }
cmake() { "$tools/bin/cmake" "$@"; }
configure() { cmake -S . -B "$1" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/$tools/bin/ninja" -DKRASIS_NATIVE_TESTS=ON "${@:2}" >/dev/null; }

step "CUDA kernels as host C++"
# For the oldest architecture and for Hopper's own instructions; a wheel is built for all.
configure build/cuda -DKRASIS_CUDA=auto -DCMAKE_CUDA_ARCHITECTURES="80-real;90a-real"
cmake --build build/cuda --target krasis_cuda_double
touch "$double_built"

step "native tests under AddressSanitizer and UndefinedBehaviorSanitizer"
configure build/sanitize -DKRASIS_SANITIZE=ON -DKRASIS_CUDA=off
cmake --build build/sanitize
"$tools/bin/ctest" --test-dir build/sanitize --output-on-failure -j 2
grep -h "^AMX kernels" build/sanitize/Testing/Temporary/LastTest.log | sort -u # by what they were checked on this machine

step "CUDA kernels compile (they run as host C++ above; no GPU is needed here)"
if grep -q '^build krasis_cuda:' build/cuda/build.ninja; then
    cmake --build build/cuda --target krasis_cuda
else
    echo "not compiled: no CUDA compiler on this machine"
fi
step "native checks passed"
