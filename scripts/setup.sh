#!/usr/bin/env bash
# Makes the virtual environment .venv (or $KRASIS_VENV) and installs Krasis with what the tests need. Safe to run again:
# a stamp of the inputs skips what is already there.
#   scripts/setup.sh [run|test|lint]     what to install for (default: run); test includes run, lint includes test
set -euo pipefail
cd "$(dirname "$0")/.."

level=${1:-run}
venv=${KRASIS_VENV:-.venv}
python=${PYTHON:-python3}
# torch goes first and alone: a later "torch>=2.6" is then satisfied and pulls no other build. Any torch >= 2.6 will do.
torch_requirement=${KRASIS_TORCH:-torch==2.13.0}

case $level in
    run) extras="" ;;
    test) extras="[test,serve,clients]" ;;
    lint) extras="[test,serve,clients,lint]" ;;
    *) echo "setup.sh: unknown level '$level' (run, test or lint)" >&2; exit 2 ;;
esac

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"setup.sh: Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")
PY
command -v c++ >/dev/null || { echo "setup.sh: no C++ compiler (c++) found; on Debian: apt-get install g++" >&2; exit 1; }

# Kernels for a GPU that is not there would only take time to compile.
if [ -z "${KRASIS_CUDA:-}" ]; then
    if [ -e /proc/driver/nvidia/version ]; then export KRASIS_CUDA=auto; else export KRASIS_CUDA=off; fi
fi

# Everything that changes what gets installed: the sources of the wheel, the Python and the torch asked for.
stamp=$( { echo "$torch_requirement $KRASIS_CUDA"; "$python" --version
           find pyproject.toml CMakeLists.txt README.md LICENSE csrc formats convert runtime -type f \
               -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum | cut -d' ' -f1)
# A level is there if it or a larger one was installed from the same sources.
case $level in run) enough="run test lint" ;; test) enough="test lint" ;; lint) enough="lint" ;; esac
for installed in $enough; do
    if [ "$(cat "$venv/.krasis-stamp" 2>/dev/null)" = "$installed $stamp" ]; then exit 0; fi
done

echo "setup.sh: installing into $venv (a few minutes the first time)" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install "$torch_requirement"
pip install ".${extras}"
echo "$level $stamp" > "$venv/.krasis-stamp"
