#!/usr/bin/env python3
"""Where the threads' time goes in the routed experts of decoding: reading weights, or waiting.

One token after the other passes through a stack of MoE layers of a real shape; the pool notes what each
thread did. For every number of threads: the weights read a second, the read bandwidth of the same threads in
the same run, the share of the time in which threads worked (mean, least and most of a thread), the rate while
they worked, and a layer's time and work by phase. A rate while working that is far below the bandwidth means
slow reads (small pages, remote nodes, short pieces); a low share means barriers, wake-ups or a scheduler that
took a CPU away.

Example: python -m scripts.profile_threads --shape qwen3-235b-a22b --format i4 --threads 8,16,32
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import click

from krasis.formats.native import Pool, check, library
from scripts import bench_common as common

NUM_ROUTINGS = 61
PHASES = ("gate and up", "down", "sum", "later")


class PoolTimes(ctypes.Structure):
    """``krasis_pool_times`` of csrc/krasis.h."""

    _fields_ = (
        ("num_jobs", ctypes.c_int64),
        ("num_phases", ctypes.c_int64),
        ("num_pieces", ctypes.c_int64),
        ("job_s", ctypes.c_double),
        ("first_phases_s", ctypes.c_double * 4),
    )


def start(pool: Pool) -> None:
    """From now on jobs of the pool are noted."""
    function = library().krasis_pool_time_start
    function.argtypes = [ctypes.c_void_p]
    check(function(pool.handle), "krasis_pool_time_start")


def end(pool: Pool) -> tuple[PoolTimes, list[float]]:
    """What was noted, and each thread's seconds of work."""
    times, busy = PoolTimes(), (ctypes.c_double * pool.num_threads)()
    function = library().krasis_pool_time_end
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    check(function(pool.handle, ctypes.byref(times), busy), "krasis_pool_time_end")
    return times, list(busy)


def measure(pool: Pool, stack: common.ExpertStack, repeats: int) -> dict[str, Any]:
    """Samples of passes through the stack, each beside the read bandwidth measured around it."""
    shape, batch = stack.shape, common.MoeBatch(stack.shape, 1, NUM_ROUTINGS)
    meter = common.BandwidthMeter(pool, stack)
    layer_bytes = shape.top_k * shape.expert_bytes(stack.tiles)
    calls = [batch.arguments(stack, i) for _ in range(8) for i in range(stack.num_layers)]
    batch.run(pool, calls)
    samples: list[dict[str, Any]] = []
    for _ in range(repeats):
        before = meter.gbps()
        start(pool)
        batch.run(pool, [batch.arguments(stack, i) for _ in range(8) for i in range(stack.num_layers)])
        times, busy = end(pool)
        shares = [one / times.job_s for one in busy]
        rate = times.num_jobs * layer_bytes / times.job_s / 1e9
        samples.append(
            {
                "read_gbps": (before + meter.gbps()) / 2,
                "weights_gbps": rate,
                "busy": sum(shares) / len(shares),
                "least_busy": min(shares),
                "most_busy": max(shares),
                "layer_us": times.job_s / times.num_jobs * 1e6,
                "pieces": times.num_pieces / times.num_jobs,
                "phase_us": [one / times.num_jobs / len(busy) * 1e6 for one in times.first_phases_s],
            }
        )
    return {"samples": samples}


def row_text(row: dict[str, Any]) -> str:
    """Medians of a case in three lines."""

    def middle(name: str) -> float:
        return common.quartiles([sample[name] for sample in row["samples"]])[1]

    rate, read, busy = middle("weights_gbps"), middle("read_gbps"), middle("busy")
    phases = [common.quartiles([s["phase_us"][i] for s in row["samples"]])[1] for i in range(len(PHASES))]
    named = ", ".join(f"{name} {us:.1f}" for name, us in zip(PHASES, phases, strict=True) if us)
    return (
        f"{row['shape']} {row['tiles']} {row['isa']}, {row['threads']} threads: "
        f"{rate:.1f} of {read:.1f} GB/s ({rate / read:.0%})\n"
        f"  threads work {busy:.1%} of the time ({middle('least_busy'):.1%} to {middle('most_busy'):.1%}), "
        f"then at {rate / busy:.1f} GB/s\n"
        f"  a layer: {middle('layer_us'):.1f} us, {middle('pieces'):.0f} pieces; work a thread in us: {named}"
    )


@click.command(help=__doc__)
@common.common_options
def main(
    shapes: list[str],
    layers: int,
    formats: str,
    isa: str,
    threads: list[int],
    repeats: int,
    json_path: Path | None,
    bundle_path: Path | None,
) -> None:
    """Prints three lines a case."""
    rows = []
    for case in common.cases(shapes, layers, formats, bundle_path):
        stack = case.stack()
        for count in threads:
            with Pool(count, "auto" if isa == "all" else isa) as pool:
                samples = measure(pool, stack, repeats)
                about = {"shape": case.shape.name, "tiles": case.tiles, "isa": pool.isa, "threads": count}
                rows.append(about | samples)
                click.echo(row_text(rows[-1]))
        stack.close()
    common.write_json(json_path, "threads", rows)


if __name__ == "__main__":
    main()
