#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds Krasis, checks it there, measures it, and writes results.json and results.md.
# Run it again after an interruption or a change: only what is not done yet runs. Nothing is downloaded.
#   scripts/device_check.sh [--stage build,native,correctness,...] [--again] [--out DIR]     --help lists the stages
# Everything is kept in $KRASIS_DEVICE_DIR (default /tmp/krasis-device). A stage takes less than 8 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c "import click" 2>/dev/null || {
    echo "device_check.sh: $python has no 'click': pip install click, or set PYTHON to a Python that has torch and click" >&2
    exit 1
}
exec "$python" -m scripts.device.run "$@"
