#!/usr/bin/env python3
"""Seconds of one MoE layer of kt-kernel at several numbers of tokens, and of handing its experts to a GPU.

Prints one JSON object. Started by stage ``reference`` with kt-kernel's folder on the path. All experts of the
layer have the same weights, each its own copy in memory: speed does not depend on the values. Formats as in
kt_runner.py. The hand-over is kt-kernel's step for prefill on the GPU (``write_weight_scale_to_buffer``),
which only its classes for natively 4-bit models have: every expert of the layer into buffers in host memory.

kt-kernel's queue is waited for at ticks (4 ms where timers are coarse), so one wait a short call would show
ticks. The queue runs tasks in their order: so many calls share a wait that it lasts a quarter of a second; a
sample is its time by their number. Short calls take other experts each, as layers of a model do: those of
one routing would stay in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from scripts.bench.kt_runner import FORMATS, Layer
from scripts.bench.layer_work import Array, LayerWork, add_options

WARM_UPS = 2
BUFFER_STEP = 64  # kt-kernel's AMX classes want buffers of whole tiles
MIN_WAITS, MIN_WAIT_S, MOST_CALLS = 3, 0.25, 1 << 14
ROUTED_TOKENS = 512  # of all routings of a case together, at least


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


@dataclass(frozen=True, slots=True)
class Samples:
    """seconds: of one call, by wait. calls: that shared a wait."""

    seconds: list[float]
    calls: int


def layer_seconds(layer: Layer, tokens: int) -> Samples:
    """Of calls with so many tokens, each routed to its own random experts."""
    work = layer.work
    random = np.random.default_rng(11)
    count = max(1, ROUTED_TOKENS // tokens)
    order = random.random((count, tokens, work.experts)).argsort(axis=-1)[..., : work.top_k]
    ids = torch.from_numpy(np.ascontiguousarray(order.astype(np.int64)))
    weights = torch.full((tokens, work.top_k), 1 / work.top_k)
    source = torch.from_numpy(work.token).to(torch.bfloat16).repeat(tokens, 1).contiguous()
    out = torch.zeros(tokens, work.hidden, dtype=torch.bfloat16)
    batch = torch.tensor([tokens], dtype=torch.int32)
    rest = (weights.data_ptr(), source.data_ptr(), out.data_ptr(), False)

    def submit(number: int) -> None:
        routed = ids[number % count].data_ptr()
        layer.cpu.submit(layer.moe.forward_task(batch.data_ptr(), work.top_k, routed, *rest))

    return sample(submit, layer.cpu.sync)


def hand_over_seconds(layer: Layer) -> Samples | None:
    """Of writing all experts of the layer into buffers for one GPU; None if the class has no such step."""
    if not layer.class_name.endswith("KGroup_MOE"):
        return None
    work = layer.work
    hidden, inner = work.hidden, work.intermediate
    sizes = (2 * inner * hidden // 2, 2 * inner * hidden // work.group * 2)
    down = (hidden * inner // 2, hidden * inner // work.group * 2)
    buffers = [torch.empty(size, dtype=torch.uint8) for size in (*sizes, *down)]
    pointers = [[buffer.data_ptr()] for buffer in buffers]

    def submit(_: int) -> None:
        for expert in range(work.experts):
            layer.cpu.submit(layer.moe.write_weight_scale_to_buffer_task(1, expert, *pointers))

    return sample(submit, layer.cpu.sync)


def sample(submit: Callable[[int], None], sync: Callable[[], object]) -> Samples:
    """After a warm-up, several waits, each for as many calls as fill it. submit: gets a call's number."""

    def wait_s(calls: int) -> float:
        begin = time.perf_counter()
        for number in range(calls):
            submit(number)
        sync()
        return time.perf_counter() - begin

    wait_s(WARM_UPS)
    calls = 1
    while (seconds := wait_s(calls)) < MIN_WAIT_S and calls < MOST_CALLS:
        # A short wait says little of a call: go there in steps.
        calls = min(MOST_CALLS, math.ceil(calls * min(8.0, 1.1 * MIN_WAIT_S / seconds)))
    return Samples([wait_s(calls) / calls for _ in range(MIN_WAITS)], calls)


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
    found = {f"layer, {count} tokens": layer_seconds(layer, count) for count in counts}
    if handed := hand_over_seconds(layer):
        found["experts handed to the GPU"] = handed
    result = {
        "seconds": {name: samples.seconds for name, samples in found.items()},
        "calls_a_wait": {name: samples.calls for name, samples in found.items()},
        "medians": {name: statistics.median(samples.seconds) for name, samples in found.items()},
        "version": f"{layer.package.__version__}, {layer.class_name}, {layer.package.__cpu_variant__} build",
    }
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
