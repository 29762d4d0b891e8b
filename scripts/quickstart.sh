#!/usr/bin/env bash
# The main job on a small real model: set up, convert BF16 + GGUF into a bundle, look at it, generate text.
#   scripts/quickstart.sh [PROMPT]
set -euo pipefail
cd "$(dirname "$0")/.."

prompt=${1:-"Explain the if statement in Python."}
venv=${KRASIS_VENV:-.venv}
model=tests/assets/tiny-qwen3-moe
work=models

scripts/setup.sh run
mkdir -p "$work"
"$venv/bin/python" -m scripts.models.make_tiny_model gguf --model "$model" --out "$work/tiny-q8_0.gguf"
"$venv/bin/krasis-convert" "$model" "$work/tiny-q8_0.gguf" -o "$work/tiny.krasis" --force
"$venv/bin/krasis-info" "$work/tiny.krasis"
echo
echo "> $prompt"
"$venv/bin/krasis-run" "$work/tiny.krasis" --prompt "$prompt" --max-tokens 200
