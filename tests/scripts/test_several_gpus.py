"""scripts/several_gpus.sh: what it runs on four GPUs, in which order, and how a call follows another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/several_gpus.sh"
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$*" >>{log}
[ "$*" = "$FAILS" ] && exit 1
echo '{{}}'
"""
SMI = """#!/bin/sh
for number in 0 1 2 3; do echo "GPU $number"; done
"""


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(folder: Path, *arguments: str, fails: str = "") -> tuple[int, list[str]]:
    """The exit code, and what was run since the last call."""
    log = folder / "log"
    log.write_text("")
    write_program(folder / "nvidia-smi", SMI)
    python = write_program(folder / "python", PYTHON.format(log=log))
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(python)}
    environment |= {"KRASIS_REFERENCE_DIR": str(folder / "work"), "KRASIS_DEVICE_DIR": str(folder / "device")}
    environment |= {"FAILS": fails}
    environment.pop("KRASIS_LIB_DIR", None)
    done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, log.read_text().splitlines()


def test_checks_come_first_and_are_made_once(tmp_path: Path) -> None:
    build = "-m scripts.device.run --stage build"
    exchanges = [f"-m scripts.bench_collectives --gpus {count}" for count in (2, 3, 4)]
    code, calls = run(tmp_path, "300")
    assert (code, calls) == (75, [build, *exchanges])  # the next stage may take longer than 300 s
    code, calls = run(
        tmp_path, "540", "--shape", "qwen3-30b-a3b", fails="-m scripts.device.run --stage ranks"
    )
    assert (code, calls) == (1, [build, "-m scripts.device.run --stage ranks"])
    code, calls = run(tmp_path, "5000", "--shape", "qwen3-30b-a3b")
    stages = [f"-m scripts.device.run --stage {stage}" for stage in ("ranks", "correctness")]
    assert code == 0
    assert calls[:-1] == [build, *stages, build]
    assert "--gpus 1,2,3,4 --pairs 3" in calls[-1]
    assert "--pairs 1 --budget-s " in calls[-1]
    assert calls[-1].endswith("--shape qwen3-30b-a3b")
    assert run(tmp_path, "5000")[1][:-1] == [build, build]
