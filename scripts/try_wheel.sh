#!/usr/bin/env bash
# Installs a built wheel into a fresh environment of each Python that is there, without the repository in sight, and lets every command
# do its work on the small trained model.
#   scripts/try_wheel.sh WHEEL [PYTHON...]   default: python3.11 python3.12 python3.13
# WITHOUT_TORCH=1 leaves torch out, which only a GPU needs.
set -euo pipefail

wheel=$(realpath "$1")
shift
model=$(realpath "$(dirname "$0")/../tests/assets/tiny-qwen3-moe")
[ $# -gt 0 ] || set -- python3.11 python3.12 python3.13
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

for python in "$@"; do
    command -v "$python" >/dev/null || { echo "$python: not there"; continue; }
    "$python" -m venv "$work/$python"
    bin="$work/$python/bin"
    pip() { "$bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
    if [ -n "${WITHOUT_TORCH:-}" ]; then
        pip install --no-deps "$wheel"
        "$bin/python" - > needs.txt <<'PY'
from importlib.metadata import requires
print("\n".join(one for one in requires("krasis-bundle") if "extra ==" not in one and not one.startswith("torch")))
PY
        pip install -r needs.txt
    else
        pip install "$wheel"
    fi
    for command in krasis krasis-convert krasis-info krasis-run krasis-serve "krasis bench"; do
        # shellcheck disable=SC2086 -- "krasis bench" is two words
        "$bin"/$command --version
    done
    "$bin/krasis" info --plan "$model" --gpus none >/dev/null
    "$bin/krasis" convert "$model" -o "$work/$python.krasis" --quiet
    "$bin/krasis-info" "$work/$python.krasis" --verify
    "$bin/krasis" run "$work/$python.krasis" --prompt "Explain the if statement in Python." --max-tokens 20 --temperature 0
    "$bin/krasis" bench "$work/$python.krasis" -p 32 -n 8 -r 1
    echo "== $("$bin/python" --version): every command works"
done
