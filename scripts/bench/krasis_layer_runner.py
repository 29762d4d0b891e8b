#!/usr/bin/env python3
"""Times krasis_moe on one layer, one token a call, its quantisation included; prints one JSON object.

Started by ``layer``. The work, weights included, is that of kt_runner.py (see layer_work.py); weights are
packed by the converter's own functions. Around every slice of half a gigabyte of weights the read bandwidth
of the same threads over the same memory is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from krasis.formats.files.aligned import aligned_empty
from krasis.formats.layouts import CpuTileLayout
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.native import Pool
from krasis.runtime.cpu.kernels import Acts, Kernels, moe_workspace_bytes, workspace
from scripts import bench_common
from scripts.bench.layer_work import MIN_SAMPLE_S, NUM_ROUTINGS, PARTS, LayerWork, add_options

SLICE_BYTES = 1 << 29
BITS = {"q8": 8, "i4": 4}


@dataclass(frozen=True)
class PackedLayer:
    """Experts as a bundle holds them. layers, layer_bytes, num_layers: what BandwidthMeter asks for."""

    blob: Any
    record_bytes: int
    layers: list[int]
    layer_bytes: int
    num_layers: int = 1


def pack(work: LayerWork, tiles: str, pool: Pool) -> PackedLayer:
    """All experts, in huge pages."""
    layout = CpuTileLayout(tiles)
    record_bytes = layout.expert_record(work.hidden, work.intermediate).record_bytes
    blob = aligned_empty(work.experts * record_bytes)
    for expert in range(work.experts):
        gate, up, down = (_matrix(work, tiles, expert, part) for part in PARTS)
        record = blob[expert * record_bytes : (expert + 1) * record_bytes]
        layout.pack_expert(pool, gate, up, down, record)
    return PackedLayer(blob, record_bytes, [bench_common.address_of(blob)], blob.nbytes)


def _matrix(work: LayerWork, tiles: str, expert: int, part: str) -> MatrixView:
    if tiles == "q8":
        return MatrixView(work.q8_0(expert, part).reshape(work.shape(part)[0], -1), "Q8_0")
    return MatrixView(work.values(expert, part), "F32")


class Layer:
    """Ready to run."""

    def __init__(self, work: LayerWork, tiles: str, pool: Pool) -> None:
        self.work, self.tiles, self.packed = work, tiles, pack(work, tiles, pool)
        self.kernels, self.acts = Kernels(pool), Acts.allocate(1, work.hidden)
        self.ids = [np.ascontiguousarray(row[None].astype(np.int32)) for row in work.routings]
        self.weights = np.full((1, work.top_k), 1 / work.top_k, np.float32)
        self.out = np.zeros((1, work.hidden), np.float32)
        sizes = (1, work.hidden, work.intermediate, work.experts, work.top_k)
        self.scratch = workspace(moe_workspace_bytes(*sizes))

    def step(self, number: int) -> None:
        """One token. Raises RuntimeError unless all its experts ran."""
        work = self.work
        self.out[...] = 0
        self.kernels.quantize(work.token, self.acts)
        ran = self.kernels.moe(
            self.packed.blob,
            self.packed.record_bytes,
            self.tiles,
            self.acts,
            self.ids[number % NUM_ROUTINGS],
            self.weights,
            self.out,
            work.intermediate,
            work.experts,
            self.scratch,
        )
        if ran != work.top_k:
            raise RuntimeError(f"{ran} of {work.top_k} experts ran")


def measure(layer: Layer, meter: bench_common.BandwidthMeter, repeats: int) -> dict[str, Any]:
    """Samples of half a second of work each, as kt_runner.py's; bandwidth is measured between its slices."""
    work = layer.work
    token_bytes = layer.packed.record_bytes * work.top_k
    slice_tokens = max(4, SLICE_BYTES // token_bytes)
    for number in range(32):
        layer.step(number)
    samples: dict[str, list[float]] = {"tokens_per_s": [], "read_gbps": [], "fraction": []}
    number = 0
    for _ in range(repeats):
        spent_s, tokens, reads, fractions = 0.0, 0, [meter.gbps()], list[float]()
        while spent_s < MIN_SAMPLE_S:
            begin = time.perf_counter()
            for _ in range(slice_tokens):
                layer.step(number)
                number += 1
            elapsed_s = time.perf_counter() - begin
            reads.append(meter.gbps())
            rate = slice_tokens * token_bytes / elapsed_s / 1e9
            fractions.append(2 * rate / (reads[-2] + reads[-1]))
            spent_s, tokens = spent_s + elapsed_s, tokens + slice_tokens
        samples["tokens_per_s"].append(tokens / spent_s)
        samples["read_gbps"].append(statistics.median(reads))
        samples["fraction"].append(statistics.median(fractions))
    return samples | {"weights_gbps": [rate * token_bytes / 1e9 for rate in samples["tokens_per_s"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--format", choices=[*BITS], required=True)
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    bits = BITS[options.format]
    work = LayerWork(options.hidden, options.intermediate, options.experts, options.top_k, bits)
    with Pool(options.threads, options.isa) as pool:
        layer = Layer(work, options.format, pool)
        meter = bench_common.BandwidthMeter(pool, layer.packed)  # type: ignore[arg-type]  # it has what is asked for
        samples = measure(layer, meter, options.repeats)
        layer.step(0)
        result = {**samples, "relative_error": [work.error(layer.out)], "isa": pool.isa}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
