#!/usr/bin/env bash
# The reference table: one very large model, a prompt of 10,000 tokens, 1 to 3 GPUs, beside llama.cpp and others.
# Needs a machine with NVIDIA GPUs and about as much RAM as the model has bytes. Writes the record, the document and
# its chart. Run it again after an interruption: what is measured is kept, what is in memory is used.
#   scripts/reference.sh [--budget-s 540] [--memory-gib 237] [--ik-llama-bench PATH] ...   options of bench/run.py
# Files lie in $KRASIS_REFERENCE_DIR (default /tmp/krasis-reference); without a package index, put llama-cpp-python's
# sdist into its folder llama-cpp-python-VERSION. $KRASIS_LIB_DIR names a CMake build to use instead of a new one.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
work=${KRASIS_REFERENCE_DIR:-/tmp/krasis-reference}
folder=${KRASIS_DEVICE_DIR:-/tmp/krasis-device}
mkdir -p "$work"

if [ -n "${KRASIS_LIB_DIR:-}" ]; then
    mkdir -p "$work/packages/krasis"
    for part in formats convert runtime; do ln -sfn "$PWD/$part" "$work/packages/krasis/$part"; done
    export PYTHONPATH="$work/packages${PYTHONPATH:+:$PYTHONPATH}"
else
    scripts/device_check.sh --stage build
    export PYTHONPATH="$folder/site:$folder/wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
# Multicast over NVLink can put GPUs that others share out of service.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}


counts=$(seq -s, 1 "$(nvidia-smi --list-gpus | wc -l)")
exec "$python" -m scripts.bench.run --stage reference --gpus "$counts" --pairs 3 --work "$work" \
    --record docs/measured/reference.h5 --out docs/BENCHMARKS.md --plots docs/plots "$@"
