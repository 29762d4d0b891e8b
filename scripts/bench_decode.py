#!/usr/bin/env python3
"""Measures decode of the routed experts: token after token through a stack of MoE layers of a real shape.

Every sample is taken between two measurements of the read bandwidth over the same memory with the same
threads; the fraction is of their mean. Experts are drawn anew for every token and layer, from gigabytes, so
that weights come from RAM. Example: python -m scripts.bench_decode --shape qwen3-30b-a3b --threads 1,2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from krasis.formats.native import Pool
from scripts import bench_common as common

SAMPLE_GB = 0.5  # near the window of the bandwidth: other work disturbs both alike
NUM_ROUTINGS = 509  # prime, so that layers and routings do not go round together


def measure(pool: Pool, stack: common.ExpertStack, repeats: int, sample_bytes: int) -> dict[str, Any]:
    """Samples of one pool and stack: GB/s of weights, read bandwidth around them, their ratio, tokens/s."""
    shape = stack.shape
    token_bytes = shape.top_k * shape.expert_bytes(stack.tiles)  # of one layer
    num_calls = max(sample_bytes // token_bytes, 4)
    batch = common.MoeBatch(shape, 1, NUM_ROUTINGS)
    meter = common.BandwidthMeter(pool, stack)
    calls = [batch.arguments(stack, i % stack.num_layers) for i in range(num_calls)]
    batch.run(pool, calls[: stack.num_layers])
    bandwidth = [meter.gbps()]
    decode = []
    for _ in range(repeats):
        decode.append(num_calls * token_bytes / batch.run(pool, calls) / 1e9)
        bandwidth.append(meter.gbps())
    fractions = [
        rate / ((before + after) / 2)
        for rate, before, after in zip(decode, bandwidth[:-1], bandwidth[1:], strict=True)
    ]
    tokens = [rate * 1e9 / (token_bytes * shape.num_layers) for rate in decode]
    return {"decode_gbps": decode, "read_gbps": bandwidth, "fraction": fractions, "tokens_per_s": tokens}


def row_text(row: dict[str, Any]) -> str:
    """A line of the table: medians, with lower and upper quartiles."""
    low, middle, high = common.quartiles(row["decode_gbps"])
    part_low, part, part_high = common.quartiles(row["fraction"])
    return (
        f"{row['shape']:<16} {row['tiles']:<5} {row['isa']:<12} {row['threads']:3}   "
        f"{middle:5.2f} ({low:5.2f}-{high:5.2f})  {common.quartiles(row['read_gbps'])[1]:7.2f}    "
        f"{part:5.1%} ({part_low:5.1%}-{part_high:5.1%})  "
        f"{common.quartiles(row['tokens_per_s'])[1]:7.2f} x {row['layers']} layers"
    )


@click.command(help=__doc__)
@common.common_options
@click.option("--sample-gb", default=SAMPLE_GB, show_default=True, help="Weights read by one sample.")
def main(
    shapes: list[str],
    layers: int,
    formats: str,
    isa: str,
    threads: list[int],
    repeats: int,
    json_path: Path | None,
    bundle_path: Path | None,
    sample_gb: float,
) -> None:
    """Prints a row a case: medians with lower and upper quartiles."""
    rows = []
    click.echo(
        f"{'shape':<16} {'tiles':<5} {'isa':<12} thr   {'GB/s of weights':<20} {'read GB/s':<10} "
        f"{'fraction of it':<20} tok/s for the stack"
    )
    for case in common.cases(shapes, layers, formats, bundle_path):
        stack = case.stack()
        for name in common.instruction_sets(isa):
            for count in threads:
                with Pool(count, name) as pool:
                    samples = measure(pool, stack, repeats, int(sample_gb * 1e9))
                rows.append(
                    {"shape": case.shape.name, "tiles": case.tiles, "isa": name, "threads": count}
                    | {"layers": case.shape.num_layers}
                    | samples
                )
                click.echo(row_text(rows[-1]))
        stack.close()
    common.write_json(json_path, "decode", rows)


if __name__ == "__main__":
    main()
