#!/usr/bin/env python3
"""Prefill of one bundle on some GPUs of this machine; prints one JSON object. Started by ``ranks``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from krasis.formats.bundle_reader import Bundle
from krasis.runtime.distributed.launch import open_engine
from krasis.runtime.planning import sizes_of_bundle
from krasis.runtime.planning.planner import whole_layer_vram_bytes
from krasis.runtime.planning.types import Workload
from krasis.runtime.settings import EngineSettings

DECODED = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    for name in ("gpus", "tokens", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    context = options.tokens + DECODED
    with Bundle.open(options.bundle) as bundle:
        workload = Workload(context, context, "bf16")
        vram_bytes = whole_layer_vram_bytes(sizes_of_bundle(bundle.manifest), workload)
    # So little VRAM that every expert is streamed, whatever card this is.
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
        begin = time.perf_counter()
        for token in ids[:DECODED]:
            engine.decode(token)
        decode_s = (time.perf_counter() - begin) / DECODED
        result = {
            "open_s": open_s,
            "first_s": seconds[0],
            "median_s": statistics.median(seconds[1:]),
            "best_s": min(seconds[1:]),
            "decode_tokens_per_s": 1 / decode_s,
            "logits_norm": float(np.linalg.norm(logits)),
            "description": engine.description,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
