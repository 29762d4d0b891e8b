#!/usr/bin/env bash
# Sets up and passes every check: lint, types, native tests under the sanitizers, the Python suite, parts of it under
# -O, and both ways of installing. This is what CI runs.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${KRASIS_VENV:-.venv}
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "set-up"
scripts/setup.sh lint
bin="$PWD/$venv/bin"

step "the README's first command"
scripts/quickstart.sh

step "lint and types"
"$bin/ruff" check .
"$bin/ruff" format --check .
git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs "$bin/clang-format" --dry-run --Werror
# mypy cannot follow the wheel's folder mapping; a folder of links shows it the same names.
mkdir -p build/typing/krasis
for part in formats convert runtime; do ln -sfn "../../../$part" "build/typing/krasis/$part"; done
"$bin/mypy" -p krasis.formats -p krasis.convert -p krasis.runtime

step "native tests under AddressSanitizer and UndefinedBehaviorSanitizer"
"$bin/python" -m pip --disable-pip-version-check --quiet install cmake ninja
"$bin/cmake" -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DKRASIS_SANITIZE=ON -DKRASIS_NATIVE_TESTS=ON -DKRASIS_CUDA=off >/dev/null
"$bin/cmake" --build build/sanitize
"$bin/ctest" --test-dir build/sanitize --output-on-failure -j 2
grep -h "^AMX kernels" build/sanitize/Testing/Temporary/LastTest.log | sort -u # by what they were checked on this machine

step "CUDA kernels compile (they run as host C++ above; no GPU is needed here)"
# For the oldest architecture and for Hopper's own instructions; a wheel is built for all.
"$bin/cmake" -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DKRASIS_CUDA=auto -DKRASIS_NATIVE_TESTS=ON \
    -DCMAKE_CUDA_ARCHITECTURES="80-real;90a-real" >/dev/null
"$bin/cmake" --build build/cuda --target krasis_cuda_double
export KRASIS_CUDA_DOUBLE="$PWD/build/cuda/csrc/cuda/tests/libkrasis_cuda_double.so"
if grep -q '^build krasis_cuda:' build/cuda/build.ninja; then
    "$bin/cmake" --build build/cuda --target krasis_cuda
else
    echo "not compiled: no CUDA compiler on this machine"
fi

step "Python suite"
"$bin/python" -m pytest -n 2 --dist worksteal -q --durations=15

# Nothing of the product may rest on assert (ruff forbids it there): what reads strangers' files and what computes.
step "Python suite under -O: files of strangers, the converter, the CPU's backends"
"$bin/python" -O -m pytest -n 2 --dist worksteal -q -m "not slow" tests/formats tests/convert tests/hostile tests/runtime/cpu

step "editable install"
editable=$(mktemp -d)
trap 'rm -rf "$editable"' EXIT
"$bin/python" -m venv "$editable/venv"
"$bin/python" -m pip --disable-pip-version-check --quiet install scikit-build-core
"$bin/python" - "$editable/venv" <<'PY'
import pathlib, sys, sysconfig
# The new environment sees this one's packages, but its own krasis comes first.
site = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
(site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
PY
KRASIS_CUDA=off "$editable/venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e .
(cd / && "$editable/venv/bin/python" - <<'PY'
import krasis.formats.native as native
from krasis.formats.native import Pool
import krasis.convert, krasis.runtime
with Pool(2) as pool:
    print("editable install:", native.__file__, native.library_path(), pool.isa)
PY
)
step "done"
