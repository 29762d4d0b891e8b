#!/usr/bin/env python3
"""Measures the packers on the shape of one expert: GB/s of BF16 input per layout, ISA and threads.

    python -m scripts.bench_pack --hidden 2048 --intermediate 768 --threads 1,2

Source matrices are Gaussian and rotate through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.layouts import (
    CpuTileLayout,
    Int8RowsLayout,
    MarlinLayout,
    MatrixView,
    PackStats,
    float32_to_bf16,
    mxfp4,
)
from krasis.formats.native import Pool

Expert = tuple[MatrixView, MatrixView, MatrixView]
LAYOUTS = (
    MarlinLayout(4, 128),
    MarlinLayout(4, 64),
    MarlinLayout(4, 32),
    MarlinLayout(4, None),
    MarlinLayout(8, 128),
    CpuTileLayout("q8"),
    CpuTileLayout("i4"),
)


def make_experts(num_experts: int, hidden: int, intermediate: int) -> list[Expert]:
    """Gaussian experts in bfloat16."""
    rng = np.random.default_rng(1)

    def matrix(n: int, k: int) -> MatrixView:
        return MatrixView(float32_to_bf16(rng.standard_normal((n, k), np.float32) * np.float32(0.02)), "BF16")

    return [
        (matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))
        for _ in range(num_experts)
    ]


def q8_0_of(expert: Expert) -> Expert:
    """Arbitrary Q8_0 blocks of the expert's shape."""

    def blocks(matrix: MatrixView) -> MatrixView:
        data = np.zeros((matrix.n, matrix.k // 32, 34), np.uint8)
        data[..., :2] = np.array([0.01], np.float16).view(np.uint8)
        data[..., 2:] = matrix.data.view(np.uint8)[:, ::2].reshape(matrix.n, -1, 32)
        return MatrixView(data.reshape(matrix.n, -1), "Q8_0")

    gate, up, down = expert
    return blocks(gate), blocks(up), blocks(down)


def measure(pack: Callable[[int], PackStats], bytes_a_call: int, seconds: float) -> tuple[float, PackStats]:
    """GB/s over the fastest of three windows, and the last call's statistics."""
    best = 0.0
    stats = pack(0)
    for _ in range(3):
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / 3 or calls == 0:
            stats = pack(calls)
            calls += 1
        best = max(best, calls * bytes_a_call / max(elapsed, 1e-9) / 1e9)
    return best, stats


def bench(pool: Pool, experts: Sequence[Expert], seconds: float) -> None:
    """Prints one line per packer."""
    hidden, intermediate = experts[0][0].k, experts[0][0].n
    weights = 3 * hidden * intermediate
    lines: list[tuple[str, Callable[[int], PackStats], int]] = []
    for layout in LAYOUTS:
        out = np.zeros(layout.expert_record(hidden, intermediate).record_bytes, np.uint8)

        def pack(i: int, layout: MarlinLayout | CpuTileLayout = layout, out: np.ndarray = out) -> PackStats:
            return layout.pack_expert(pool, *experts[i % len(experts)], out)

        lines.append((layout.layout_id, pack, weights * 2))
    tiles = CpuTileLayout("q8")
    out_q8 = np.zeros(tiles.expert_record(hidden, intermediate).record_bytes, np.uint8)
    four = CpuTileLayout("mxfp4")
    out_fp4 = np.zeros(four.expert_record(hidden, intermediate).record_bytes, np.uint8)
    fp4 = [
        [MatrixView(mxfp4.quantize(one.to_float32()), "MXFP4") for one in expert] for expert in experts[:4]
    ]
    lines.append(
        (
            "cpu-mxfp4 from MXFP4 (GB of MXFP4)",
            lambda i: four.pack_expert(pool, *fp4[i % len(fp4)], out_fp4),
            weights * 17 // 32,
        )
    )
    blocks = [q8_0_of(expert) for expert in experts[:8]]
    lines.append(
        (
            "cpu-q8 from Q8_0 (GB of Q8_0)",
            lambda i: tiles.pack_expert(pool, *blocks[i % len(blocks)], out_q8),
            weights * 34 // 32,
        )
    )
    rows = Int8RowsLayout()
    codes = np.empty(rows.codes_shape(intermediate, hidden), np.int8)
    scales = np.empty(intermediate, np.float32)
    lines.append(
        (
            rows.layout_id,
            lambda i: rows.pack(pool, experts[i % len(experts)][0], codes, scales),
            weights * 2 // 3,
        )
    )
    for name, function, num_bytes in lines:
        rate, stats = measure(function, num_bytes, seconds)
        heading = f"{pool.isa:12} {pool.num_threads:3} threads  {name:30}"
        print(f"{heading} {rate:6.2f} GB/s   relative MSE {stats.relative_mse:.3e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--threads", default="1,0", help="comma-separated; 0 = all")
    parser.add_argument("--isa", default="avx2,avx512_vnni")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    arguments = parser.parse_args()
    experts = make_experts(arguments.experts, arguments.hidden, arguments.intermediate)
    for isa in arguments.isa.split(","):
        for threads in (int(text) for text in arguments.threads.split(",")):
            try:
                pool = Pool(threads, isa)
            except NativeError as error:
                print(f"{isa}: {error}")
                break
            with pool:
                bench(pool, experts, arguments.seconds)


if __name__ == "__main__":
    main()
