#!/usr/bin/env python3
"""Seconds of one MoE layer of kt-kernel at several numbers of tokens, and of handing its experts to a GPU.

Prints one JSON object. Started by stage ``reference`` with kt-kernel's folder on the path. All experts of the
layer have the same weights, each its own copy in memory: speed does not depend on the values. Formats as in
kt_runner.py. The hand-over is kt-kernel's step for prefill on the GPU (``write_weight_scale_to_buffer``),
which only its classes for natively 4-bit models have: every expert of the layer into buffers in host memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.kt_runner import FORMATS, Layer
from bench.layer_work import Array, LayerWork, add_options

WARM_UPS = 2
BUFFER_STEP = 64  # kt-kernel's AMX classes want buffers of whole tiles
MIN_CALLS, MAX_CALLS, MIN_S = 3, 200, 0.5


class SameExperts(LayerWork):
    """Every expert has the first one's weights, which are made once."""

    @cache  # noqa: B019 -- one object a process
    def values(self, expert: int, part: str) -> Array:
        return super().values(0, part) if expert else super().values(expert, part)

    @cache  # noqa: B019
    def nibbles(self, expert: int, part: str) -> tuple[Array, Array]:
        return super().nibbles(0, part) if expert else super().nibbles(expert, part)

    def matrix(self, expert: int, part: str) -> tuple[Array, Array]:
        codes, scales = self._base[part]
        return codes, scales


def layer_seconds(layer: Layer, tokens: int) -> list[float]:
    """Of calls with so many tokens, each routed to its own random experts."""
    work = layer.work
    random = np.random.default_rng(11)
    order = random.random((tokens, work.experts)).argsort(axis=-1)[:, : work.top_k]
    ids = torch.from_numpy(np.ascontiguousarray(order.astype(np.int64)))
    weights = torch.full((tokens, work.top_k), 1 / work.top_k)
    source = torch.from_numpy(work.token).to(torch.bfloat16).repeat(tokens, 1).contiguous()
    out = torch.zeros(tokens, work.hidden, dtype=torch.bfloat16)
    batch = torch.tensor([tokens], dtype=torch.int32)
    addresses = (ids.data_ptr(), weights.data_ptr(), source.data_ptr(), out.data_ptr())

    def call() -> float:
        begin = time.perf_counter()
        layer.cpu.submit(layer.moe.forward_task(batch.data_ptr(), work.top_k, *addresses, False))
        layer.cpu.sync()
        return time.perf_counter() - begin

    return sample(call)


def hand_over_seconds(layer: Layer) -> list[float]:
    """Of writing all experts of the layer into buffers for one GPU; empty if the class has no such step."""
    if not layer.class_name.endswith("KGroup_MOE"):
        return []
    work = layer.work
    hidden, inner = work.hidden, work.intermediate
    sizes = (2 * inner * hidden // 2, 2 * inner * hidden // work.group * 2)
    down = (hidden * inner // 2, hidden * inner // work.group * 2)
    buffers = [torch.empty(size, dtype=torch.uint8) for size in (*sizes, *down)]
    pointers = [[buffer.data_ptr()] for buffer in buffers]

    def call() -> float:
        begin = time.perf_counter()
        for expert in range(work.experts):
            layer.cpu.submit(layer.moe.write_weight_scale_to_buffer_task(1, expert, *pointers))
            layer.cpu.sync()
        return time.perf_counter() - begin

    return sample(call)


def sample(call: Any) -> list[float]:
    """Several times after a warm-up, for half a second at least."""
    for _ in range(WARM_UPS):
        call()
    found: list[float] = []
    while len(found) < MIN_CALLS or (sum(found) < MIN_S and len(found) < MAX_CALLS):
        found.append(call())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--format", choices=[*FORMATS], required=True)
    parser.add_argument("--tokens", required=True, help="Such as 1,512,2048.")
    options = parser.parse_args()
    counts = sorted({int(part) for part in options.tokens.split(",")})
    sizes = (options.hidden, options.intermediate, options.experts, options.top_k)
    work = SameExperts(*sizes, *FORMATS[options.format])
    layer = Layer(options, work, max_tokens=-(-max(counts) // BUFFER_STEP) * BUFFER_STEP)
    seconds = {f"layer, {count} tokens": layer_seconds(layer, count) for count in counts}
    if handed := hand_over_seconds(layer):
        seconds["experts handed to the GPU"] = handed
    result = {
        "seconds": seconds,
        "medians": {name: statistics.median(samples) for name, samples in seconds.items()},
        "version": f"{layer.package.__version__}, {layer.class_name}, {layer.package.__cpu_variant__} build",
    }
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
