#!/usr/bin/env python3
"""A prompt and tokens after it on some GPUs of this machine; prints one JSON object. Started by ``ranks``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine
from krasis.runtime.distributed.launch import open_engine
from krasis.runtime.settings import EngineSettings
from scripts.device.limits import streaming_vram_bytes

WARM_UP = 8


def decode_s(engine: Engine, token: int) -> float:
    """Seconds of one token."""
    begin = time.perf_counter()
    engine.decode(token)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    for name in ("gpus", "tokens", "repeats", "decode"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument(
        "--vram", type=int, default=0, help="Bytes of each GPU; 0: so few that every expert is streamed."
    )
    parser.add_argument("--logits", type=Path, required=True, help="Keep the prompt's there (.npy).")
    options = parser.parse_args()
    context = options.tokens + WARM_UP + options.decode
    with Bundle.open(options.bundle) as bundle:
        streamed_bytes = streaming_vram_bytes(bundle, context, options.device, options.gpus)
    vram_bytes = options.vram or streamed_bytes
    settings = EngineSettings(device=options.device, context=context, prefault=False, vram_bytes=vram_bytes)
    begin = time.perf_counter()
    engine = open_engine(options.bundle, settings, options.gpus)
    if engine is None:
        raise SystemExit(0)
    with engine:
        open_s = time.perf_counter() - begin
        random = np.random.default_rng(1)
        ids = random.integers(0, engine.architecture.vocab_size, options.tokens).tolist()
        seconds = []
        for _ in range(options.repeats + 1):
            engine.reset()
            begin = time.perf_counter()
            logits = engine.prefill(ids)
            seconds.append(time.perf_counter() - begin)
        np.save(options.logits, logits)
        answer = random.integers(0, engine.architecture.vocab_size, WARM_UP + options.decode).tolist()
        each_s = [decode_s(engine, token) for token in answer][WARM_UP:]
        result = {
            "vram_bytes": vram_bytes,
            "open_s": open_s,
            "first_s": seconds[0],
            "median_s": statistics.median(seconds[1:]),
            "best_s": min(seconds[1:]),
            "decode_tokens_per_s": len(each_s) / sum(each_s),
            "decode_median_s": statistics.median(each_s),
            "decoded_on": engine.placement[1],
            "logits_norm": float(np.linalg.norm(logits)),
            "description": engine.description,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
