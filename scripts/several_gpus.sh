#!/usr/bin/env bash
# All that a machine with 3 or 4 GPUs is asked, in one lease, most important first: are the exchanges right and how
# fast, does every number of GPUs give one GPU's logits, the reference table. Run it again after an interruption:
# what is done is kept. A call ends after about BUDGET_S seconds (default 540), with 75 if something is left.
#   scripts/several_gpus.sh [BUDGET_S] [options of bench/run.py]
# What it takes, from two GPUs' times (docs/measured/reference.h5) and 30 s a Krasis run, 65 s one of llama.cpp:
#   build 2 to 4 min; exchanges 1 min a number of GPUs; ranks up to 8 min; correctness up to 8 min;
#   reference with --pairs 1 on 4 GPUs: 94 layers 5 min, beside llama.cpp 13 min, files 2 to 3 min each.
set -euo pipefail
cd "$(dirname "$0")/.."

budget_s=540
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    budget_s=$1
    shift
fi
python=${PYTHON:-python3}
work=${KRASIS_REFERENCE_DIR:-/tmp/krasis-reference}
folder=${KRASIS_DEVICE_DIR:-/tmp/krasis-device}
mkdir -p "$work"
num_gpus=$(nvidia-smi --list-gpus | wc -l)
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

# Ends the call, to be gone on with by the next, if so many seconds more would be too many. Something is always done.
num_done=0
needs() {
    if ((SECONDS + $1 > budget_s && num_done > 0)); then
        echo "several_gpus.sh: $2 is for the next call"
        exit 75
    fi
    num_done=$((num_done + 1))
}

scripts/device_check.sh --stage build
export PYTHONPATH="$folder/site:$folder/wheels${PYTHONPATH:+:$PYTHONPATH}"
for ((count = 2; count <= num_gpus; count++)); do
    result=$work/exchange-$count.json
    [ -s "$result" ] && continue
    needs 60 "the exchange of $count GPUs"
    "$python" -m scripts.bench_collectives --gpus "$count" >"$result.part"
    mv "$result.part" "$result"
done
for stage in ranks correctness; do
    [ -e "$work/$stage.done" ] && continue
    needs 480 "stage $stage"
    scripts/device_check.sh --stage "$stage"
    touch "$work/$stage.done"
done
needs 90 "the reference"
scripts/reference.sh --pairs 1 --budget-s $((budget_s - SECONDS)) "$@"
