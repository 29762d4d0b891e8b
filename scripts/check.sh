#!/usr/bin/env bash
# Sets up and passes every check: lint, types, native tests under the sanitizers, the Python suite, parts of it under
# -O, and both ways of installing. This is what CI runs. What is native runs beside the rest: check_native.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${KRASIS_VENV:-.venv}
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

native_log=build/native.log
double_built=$PWD/build/double.built
mkdir -p build
rm -f "$double_built"
set -m # a process group of its own, to be ended as a whole
scripts/check_native.sh "$double_built" >"$native_log" 2>&1 </dev/null &
native=$!
set +m
editable=$(mktemp -d)
trap 'kill -- "-$native" 2>/dev/null || true; rm -rf "$editable"' EXIT

native_failed() {
    cat "$native_log"
    echo "check.sh: the native checks failed" >&2
    exit 1
}

step "set-up"
# Modules are compiled when they are imported: most of what is installed never is.
PIP_NO_COMPILE=0 scripts/setup.sh lint
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

step "Python suite"
until [ -e "$double_built" ]; do
    kill -0 "$native" 2>/dev/null || native_failed
    sleep 1
done
export KRASIS_CUDA_DOUBLE="$PWD/build/cuda/csrc/cuda/tests/libkrasis_cuda_double.so"
"$bin/python" -m pytest -n 2 --dist worksteal -q --durations=15

# Nothing of the product may rest on assert: ruff and tests/test_asserts.py find none. That the rest of what -O changes
# is nothing show those who refuse: files of strangers, arguments of native calls, command lines.
step "refusals under -O"
"$bin/python" -O -m pytest -n 2 --dist worksteal -q -m "not slow" tests/hostile tests/convert/test_refusals.py \
    tests/runtime/cpu/kernels/test_wrappers.py tests/formats/bundle/test_bundle.py tests/e2e/test_run_cli.py

step "editable install"
"$bin/python" -m venv "$editable/venv"
"$bin/python" -m pip --disable-pip-version-check --quiet install scikit-build-core cmake ninja
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

step "native checks: waiting for their end"
wait "$native" || native_failed
grep -E '^(-- |AMX kernels|100% tests passed|not compiled)' "$native_log"
step "done"
