"""The same prompt and tokens after it on one, two, ... GPUs of this machine, and what the ranks exchange."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from krasis.runtime.gpu.opening import DOUBLE_BYTES
from scripts.device import places
from scripts.device.context import Context
from scripts.device.prefill import CARD_BYTES
from scripts.device.runner import SkippedError


class RanksError(Exception):
    """A number of GPUs failed; the log has its output."""


def run(context: Context) -> dict[str, Any]:
    """By number of GPUs: prefill, decode after it, and logits against one GPU's; with every expert streamed,
    and with a small card's memory. Raises SkippedError with one GPU, RanksError if one fails.
    """
    counts = gpu_counts(context)
    if len(counts) < 2:
        raise SkippedError("this machine has one GPU")
    exchange = run_json(
        [
            "scripts.bench_collectives",
            "--device",
            context.device,
            *exchange_sizes(context, counts),
        ]
    )
    bundle, made = places.bundle_in_ram(context, "30b" if context.size == "tiny" else "235b")
    card_bytes = CARD_BYTES if context.is_cuda else DOUBLE_BYTES
    runs = {str(count): run_once(context, bundle, count, 0) for count in counts}
    cards = {str(count): run_once(context, bundle, count, card_bytes) for count in counts}
    for found in (runs, cards):
        against_one(context, found)
    num_tokens = context.sizes.prompt_tokens
    return {**made, "num_tokens": num_tokens, "exchange": exchange, "runs": runs, "cards": cards}


def run_once(context: Context, bundle: Path, count: int, vram_bytes: int) -> dict[str, Any]:
    """The prompt and the tokens on so many GPUs. vram_bytes: of each; 0: every expert is streamed."""
    sizes, logits = context.sizes, logits_path(context, count)
    options: dict[str, object] = {
        "--device": context.device,
        "--gpus": count,
        "--tokens": sizes.prompt_tokens,
        "--repeats": sizes.repeats,
        "--decode": sizes.decode_tokens,
        "--vram": vram_bytes,
        "--logits": logits,
    }
    flat = [part for pair in options.items() for part in pair]
    found = run_json(["scripts.device.rank_run", bundle, *flat])
    return found | {"logits": np.load(logits)}


def logits_path(context: Context, count: int) -> Path:
    """Where a run leaves them."""
    return context.folder / f"ranks-{count}.npy"


def against_one(context: Context, runs: dict[str, dict[str, Any]]) -> None:
    """Puts a distance in place of each run's logits."""
    one = runs["1"]["logits"].astype(np.float64)
    for run in runs.values():
        logits = run.pop("logits")
        run["relative_distance"] = float(np.linalg.norm(logits - one) / np.linalg.norm(one))
        run["same_token"] = bool(np.argmax(logits) == np.argmax(one))


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
    """The JSON object that a script prints. arguments: its module, then its own."""
    command = [sys.executable, "-m", *(str(one) for one in arguments)]
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr, done.stdout, flush=True)
    if done.returncode:
        raise RanksError(f"{command[2]}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    record: dict[str, Any] = json.loads(done.stdout[max(0, done.stdout.find("{")) :])
    return record
