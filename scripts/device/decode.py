"""Hybrid decode: tokens a second, where the time goes, and the same on the CPU alone."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from krasis.runtime import Engine
from scripts.device import places, rates
from scripts.device.context import Context
from scripts.device.devices import facts_of, open_engine
from scripts.device.prefill import CARD, vram_budgets

WARM_UP = 8
CPU_PROMPT = 16


def run_30b(context: Context) -> dict[str, Any]:
    return run(context, "30b")


def run_235b(context: Context) -> dict[str, Any]:
    return run(context, "235b")


def run(context: Context, label: str) -> dict[str, Any]:
    """With hardly any VRAM for hot experts, with a 16 GiB card's, with all there is, and without a GPU."""
    bundle, made = places.bundle_in_ram(context, label)
    result: dict[str, Any] = {**made, "host_read_gbps": rates.host_read_gbps(), "runs": {}}
    prompt = context.sizes.decode_prompt
    num_positions = prompt + context.sizes.decode_tokens + WARM_UP + 1
    budgets: dict[str, int | None] = {**vram_budgets(context, bundle, num_positions), "all VRAM": None}
    if context.size == "tiny":
        del budgets[CARD]
    for name, vram_bytes in budgets.items():
        with open_engine(context, bundle, num_positions, vram_bytes=vram_bytes) as engine:
            result["runs"][name] = decode(context, engine, prompt)
            arch = engine.architecture
            record_bytes = engine.bundle.blob("layers.0.experts.cpu").shape[1]
    result["cpu_bytes_per_token"] = arch.num_layers * arch.num_experts_per_token * record_bytes
    with open_engine(context, bundle, num_positions, device="cpu") as engine:
        result["runs"]["CPU alone"] = decode(context, engine, min(CPU_PROMPT, prompt))
    return result


def decode(context: Context, engine: Engine, prompt: int) -> dict[str, Any]:
    """Random tokens one by one: which token follows does not matter for speed."""
    random = np.random.default_rng(2)
    vocab = engine.architecture.vocab_size
    engine.prefill(random.integers(0, vocab, prompt))
    warm_up = WARM_UP if context.size == "real" else 1
    for _ in range(warm_up):
        engine.decode(int(random.integers(vocab)))
    decoder = decoder_of(engine)
    if decoder is not None and hasattr(decoder, "reset_split"):
        decoder.reset_split()
    seconds = []
    for _ in range(context.sizes.decode_tokens):
        token = int(random.integers(vocab))
        begin = time.perf_counter()
        engine.decode(token)
        seconds.append(time.perf_counter() - begin)
    split = decoder.mean_split() if decoder is not None and hasattr(decoder, "mean_split") else {}
    return {
        "tokens_per_s": 1 / statistics.median(seconds),
        "median_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "prompt": prompt,
        "split": split,
        "engine": facts_of(engine),
    }


def decoder_of(engine: Engine) -> Any:
    """The hybrid decoder of a GPU backend; None without one."""
    backend = engine._backend
    parts = getattr(backend, "_parts", None)
    for owner in (backend, parts):
        for name in ("decoder", "_decoder"):
            if getattr(owner, name, None) is not None:
                return getattr(owner, name)
    return None
