"""A long prompt through a stack of real layers, all experts in host RAM, against what the machine allows."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from device import kernel_times, places, rates
from device.context import Context
from device.devices import facts_of, open_engine
from device.limits import prefill_work
from krasis.runtime import Engine

GOAL = 1.15


def run_30b(context: Context) -> dict[str, Any]:
    return run(context, "30b")


def run_235b(context: Context) -> dict[str, Any]:
    return run(context, "235b")


def run(context: Context, label: str) -> dict[str, Any]:
    """time / max(bytes / pinned-copy rate, flops / matmul rate), with its parts."""
    bundle, made = places.bundle_in_ram(context, label)
    measured = rates.measure(context)
    num_tokens = context.sizes.prompt_tokens
    begin = time.perf_counter()
    with open_engine(context, bundle, num_tokens + 16) as engine:
        open_s = time.perf_counter() - begin
        ids = np.random.default_rng(1).integers(0, engine.architecture.vocab_size, num_tokens)
        first_s = prefill_s(engine, ids)  # waits for what is loaded in the background
        seconds = [prefill_s(engine, ids) for _ in range(context.sizes.repeats)]
        kernels = kernel_times.kernels_of(context, lambda: prefill_s(engine, ids))
        facts = facts_of(engine)
        last = last_prefill(engine)
        record_bytes = engine.bundle.blob("layers.0.experts.gpu").shape[1]
        work = prefill_work(engine.architecture, num_tokens, record_bytes)
    limit = work.limit_s(measured["pinned_to_device_gbps"], measured["matmul_tflops"])
    return {
        **made,
        "num_tokens": num_tokens,
        "open_s": open_s,
        "first_s": first_s,
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "tokens_per_s": num_tokens / statistics.median(seconds),
        "ratio": statistics.median(seconds) / limit,
        "goal": GOAL,
        "work": work.to_json(measured["pinned_to_device_gbps"], measured["matmul_tflops"]),
        "rates": measured,
        "engine": facts,
        "last_prefill": last,
        "kernels": kernels,
    }


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
    """What the backend says it did."""
    last = getattr(engine._backend, "last_prefill", None)
    names = ("path", "num_tokens", "num_passes", "num_copies", "bytes_copied", "expected_s")
    return {name: getattr(last, name) for name in names if hasattr(last, name)}
