"""Starts ``ranks_script.py``, once for all of pytest's workers."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "ranks_script.py"
DOUBLE = os.environ.get("KRASIS_CUDA_DOUBLE", "")
BUILT = Path(__file__).parents[3] / "build/cuda/csrc/cuda/tests/libkrasis_cuda_double.so"
CONTEXT, GROUP = 64, 8

needs_double = pytest.mark.skipif(
    not Path(DOUBLE).is_file() and not BUILT.is_file(),
    reason="no libkrasis_cuda_double.so: build the target krasis_cuda_double, or set KRASIS_CUDA_DOUBLE",
)
Plan = list[tuple[Any, ...]]
"""(bundle, [(number of ranks, bytes of VRAM), ...], and more settings, if there are)."""


def computed_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, plan: Plan, job: str | None = None
) -> Path:
    """The folder of that name, in which a job left its results (of the same name unless said);
    pytest-xdist's workers, which may each run some of the tests, share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()
            done = run_script(job or name, folder, json.dumps(plan))
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    return folder


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its end."""
    flags = ["-O"] if sys.flags.optimize else []
    command = [sys.executable, *flags, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def vram_bytes(bundle: Path, num_ranks: int, slots: int = 1) -> int:
    """So much that a layer's experts come in groups of GROUP."""
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.planning import assumptions, sizes_of_bundle
    from krasis.runtime.planning.placement import gpu_workspace_bytes

    with Bundle.open(bundle) as opened:
        sizes = sizes_of_bundle(opened.manifest)
    fixed = assumptions.GPU_RESERVE_BYTES + sizes.dense_bytes + slots * sizes.kv_bytes(CONTEXT, "f16")
    workspace = gpu_workspace_bytes(sizes.spec, CONTEXT, num_ranks)
    return fixed + workspace + 2 * GROUP * sizes.gpu_expert_bytes
