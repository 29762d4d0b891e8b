"""The kernels' own tests and benchmark, as csrc/cuda/tests/device.sh built them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from scripts.device.context import Context


class NativeTestError(Exception):
    """A native test failed; its output is in the log."""


def run(context: Context) -> dict[str, Any]:
    """Raises NativeTestError if a test fails."""
    folder = context.folder / "native"
    tests = output_of(folder / "krasis_test_cuda_device")
    bench = output_of(folder / "krasis_bench_cuda")
    return {"tests": last_line(tests), "bench": bench.strip().splitlines()}


def output_of(program: Path, *arguments: str) -> str:
    """What it prints, also into the log."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise NativeTestError(f"{program.name} exits with {done.returncode}")
    return done.stdout


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
