"""A long prompt through a stack of real layers, all experts in host RAM, against what the machine allows."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine
from krasis.runtime.planning.sizes import sizes_of_bundle
from scripts.device import kernel_times, places, rates
from scripts.device.context import GIB, Context
from scripts.device.devices import facts_of, open_engine
from scripts.device.limits import prefill_work, streaming_vram_bytes

GOAL = 1.15
MORE_POSITIONS = 16
STREAMED, CARD, CARD_BYTES = "all streamed", "16 GiB", 16 * GIB


def run_30b(context: Context) -> dict[str, Any]:
    return run(context, "30b")


def run_235b(context: Context) -> dict[str, Any]:
    return run(context, "235b")


def run(context: Context, label: str) -> dict[str, Any]:
    """time / max(bytes / pinned-copy rate, flops / matmul rate), with its parts, for some sizes of VRAM."""
    bundle, made = places.bundle_in_ram(context, label)
    measured = rates.measure(context)
    num_tokens = context.sizes.prompt_tokens
    budgets = vram_budgets(context, bundle, num_tokens + MORE_POSITIONS)
    if context.size == "tiny":
        budgets = {STREAMED: budgets[STREAMED]}
    runs = {}
    for name, vram_bytes in budgets.items():
        print(f"{name}: {vram_bytes / 1e9:.2f} GB of VRAM", flush=True)
        runs[name] = run_once(context, bundle, vram_bytes, measured)
    streamed = runs[STREAMED]
    if streamed["work"]["streamed_bytes"] != streamed["all_bytes"]:
        raise ValueError(f"not every expert was copied from host memory: {streamed['last_prefill']}")
    return {
        **made,
        "goal": GOAL,
        "num_tokens": num_tokens,
        "ratio": streamed["ratio"],
        "rates": measured,
        "runs": runs,
    }


def run_once(context: Context, bundle: Path, vram_bytes: int, measured: dict[str, float]) -> dict[str, Any]:
    """The prompt again and again, with so much VRAM."""
    num_tokens = context.sizes.prompt_tokens
    begin = time.perf_counter()
    with open_engine(context, bundle, num_tokens + MORE_POSITIONS, vram_bytes=vram_bytes) as engine:
        open_s = time.perf_counter() - begin
        ids = np.random.default_rng(1).integers(0, engine.bundle.spec.vocab, num_tokens)
        first_s = prefill_s(engine, ids)  # waits for what is loaded in the background
        prefill_s(engine, ids)  # after the first, hot experts move in
        seconds = [prefill_s(engine, ids) for _ in range(context.sizes.repeats)]
        last = last_prefill(engine)
        kernels = kernel_times.kernels_of(context, lambda: prefill_s(engine, ids))
        facts = facts_of(engine)
        work = prefill_work(sizes_of_bundle(engine.bundle.manifest), num_tokens)
    all_bytes = work.streamed_bytes
    if "bytes_copied" in last:  # less than all where experts are resident
        work = replace(work, streamed_bytes=last["bytes_copied"])
    limits = (measured["pinned_to_device_gbps"], measured["matmul_tflops"])
    return {
        "vram_bytes": vram_bytes,
        "all_bytes": all_bytes,
        "open_s": open_s,
        "first_s": first_s,
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "tokens_per_s": num_tokens / statistics.median(seconds),
        "ratio": statistics.median(seconds) / work.limit_s(*limits),
        "work": work.to_json(*limits),
        "engine": facts,
        "last_prefill": last,
        "kernels": kernels,
    }


def vram_budgets(context: Context, bundle: Path, num_positions: int) -> dict[str, int]:
    """As little as streams every expert in one pass, and what a card of 16 GiB has."""
    with Bundle.open(bundle) as opened:
        return {STREAMED: streaming_vram_bytes(opened, num_positions, context.device), CARD: CARD_BYTES}


def prefill_s(engine: Engine, ids: np.ndarray[Any, Any]) -> float:
    """Seconds of the prompt from nothing; the logits are on the host then."""
    engine.reset()
    begin = time.perf_counter()
    logits = engine.prefill(ids)
    seconds = time.perf_counter() - begin
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return seconds


def last_prefill(engine: Engine) -> dict[str, Any]:
    """What the backend says it did; nothing on the CPU."""
    last = getattr(engine._backend, "last_prefill", None)
    return asdict(last) if last is not None else {}
