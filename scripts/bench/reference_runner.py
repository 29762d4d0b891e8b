#!/usr/bin/env python3
"""A long prompt, then tokens one by one after it, as a user meets them; prints one JSON object.

Cold: seconds from the start of this process to the first token of the prompt. Warm: the same prompt again
(--warm-up), which is what llama-bench measures. Then --generate random tokens after the prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from krasis.formats.native import library_path
from krasis.runtime import Engine, EngineSettings
from scripts.bench.krasis_runner import open_on

WARM_UP_TOKENS = 8
SEED = 20


def started_s() -> float:
    """When this process began, on the clock of ``time.clock_gettime(CLOCK_BOOTTIME)``."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def since_start_s() -> float:
    """Seconds that this process has run."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s()


def measure(engine: Engine, prompt: int, generate: int, warm_up: bool, logits: Path | None) -> dict[str, Any]:
    """Samples by case; seconds until the first token."""
    random = np.random.default_rng(SEED)
    vocab = engine.architecture.vocab_size
    ids = random.integers(0, vocab, prompt).tolist()
    answer = random.integers(0, vocab, generate + WARM_UP_TOKENS).tolist()
    cold_s, values = timed_prefill(engine, ids)
    result: dict[str, Any] = {"first_token_s": since_start_s(), "cold_prefill_s": cold_s, "cases": {}}
    if logits is not None:
        np.save(logits, values)
    prefill_s = cold_s
    if warm_up:
        engine.reset()
        prefill_s, _ = timed_prefill(engine, ids)
    result["cases"][f"pp{prompt}"] = {"tokens_per_s": [prompt / prefill_s]}
    if generate:
        for token in answer[:WARM_UP_TOKENS]:
            engine.decode(token)
        begin = time.perf_counter()
        for token in answer[WARM_UP_TOKENS:]:
            engine.decode(token)
        rate = generate / (time.perf_counter() - begin)
        result["cases"][f"tg{generate}@{prompt}"] = {"tokens_per_s": [rate]}
    return result


def timed_prefill(engine: Engine, ids: list[int]) -> tuple[float, Any]:
    """Seconds, and the logits of the last token."""
    begin = time.perf_counter()
    values = engine.prefill(ids)
    return time.perf_counter() - begin, values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=10_000)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: every CPU.")
    parser.add_argument("--gpus", type=int, default=0, help="0: the CPU alone.")
    parser.add_argument("--device", default="cuda", help="cuda, or double to try the commands without a GPU.")
    parser.add_argument("--vram", type=int, default=0, help="Bytes of each GPU's memory to use; 0: all.")
    parser.add_argument("--warm-up", action="store_true", help="Time the prompt's second run.")
    parser.add_argument(
        "--logits", type=Path, help="Keep the logits of the prompt's last token there (.npy)."
    )
    options = parser.parse_args()
    context = options.prompt + options.generate + WARM_UP_TOKENS
    settings = EngineSettings(
        context=context,
        threads=options.threads,
        device=options.device if options.gpus else "cpu",
        vram_bytes=options.vram or None,
        prefill_chunk=None if options.gpus else min(context, 2048),
    )
    with open_on(options.bundle, settings, options.gpus) as engine:
        open_s = since_start_s()
        result = measure(engine, options.prompt, options.generate, options.warm_up, options.logits)
        library = library_path()
        result |= {
            "open_s": open_s,
            "engine": engine.description,
            "resident_experts": int(getattr(engine._backend, "num_resident_experts", 0)),
            "library": hashlib.sha256(library.read_bytes()).hexdigest()[:12],
        }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
