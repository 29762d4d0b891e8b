"""The same prompt on one, two, ... GPUs of this machine, and what the ranks exchange for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from device import places
from device.context import REPOSITORY, Context
from device.runner import SkippedError


class RanksError(Exception):
    """A number of GPUs failed; the log has its output."""


def run(context: Context) -> dict[str, Any]:
    """Seconds of prefill by number of GPUs. Raises SkippedError with one GPU, RanksError if one fails."""
    counts = gpu_counts(context)
    if len(counts) < 2:
        raise SkippedError("this machine has one GPU")
    exchange = run_json(
        [
            REPOSITORY / "scripts/bench_collectives.py",
            "--device",
            context.device,
            *exchange_sizes(context, counts),
        ]
    )
    bundle, made = places.bundle_in_ram(context, "30b" if context.size == "tiny" else "235b")
    runs = {}
    for count in counts:
        command = [
            Path(__file__).with_name("rank_run.py"),
            bundle,
            "--device",
            context.device,
            "--gpus",
            count,
        ]
        sizes = context.sizes
        runs[str(count)] = run_json([*command, "--tokens", sizes.prompt_tokens, "--repeats", sizes.repeats])
    return {**made, "num_tokens": context.sizes.prompt_tokens, "exchange": exchange, "runs": runs}


def gpu_counts(context: Context) -> list[int]:
    """1, 2, 3, 4 and all, of those that there are."""
    if not context.is_cuda:
        return [1, 2]
    import torch

    most = torch.cuda.device_count()
    return sorted({count for count in (1, 2, 3, 4, most) if count <= most})


def exchange_sizes(context: Context, counts: list[int]) -> list[object]:
    """Options of bench_collectives."""
    sizes: list[object] = ["--gpus", counts[-1]]
    return sizes if context.size == "real" else [*sizes, "--tokens", "7,40", "--hidden", 64, "--repeats", 1]


def run_json(arguments: list[Any]) -> dict[str, Any]:
    """The JSON object that a script prints."""
    command = [sys.executable, *(str(one) for one in arguments)]
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr, done.stdout, flush=True)
    if done.returncode:
        raise RanksError(f"{Path(command[1]).name}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    record: dict[str, Any] = json.loads(done.stdout[max(0, done.stdout.find("{")) :])
    return record
