#!/usr/bin/env python3
"""Measures prefill of the routed experts: batches of tokens through a stack of MoE layers of a real shape.

Example: python -m scripts.bench_prefill --shape qwen3-30b-a3b --tokens 512 --threads 1,2
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from krasis.formats.native import Pool
from scripts import bench_common as common

NUM_ROUTINGS = 3


def measure(
    pools: dict[str, Pool], stack: common.ExpertStack, tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Samples by instruction set: tokens/s, 10^9 multiply-adds a second, read bandwidth.

    The pools take turns, so that whatever else the machine does meets all of them alike.
    """
    shape = stack.shape
    batch = common.MoeBatch(shape, tokens, NUM_ROUTINGS)
    meters = {name: common.BandwidthMeter(pool, stack) for name, pool in pools.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, pool in pools.items():
        batch.run(pool, [batch.arguments(stack, stack.num_layers - 1)])
        found[name] = {"tokens_per_s": [], "gmacs": [], "read_gbps": [meters[name].gbps()]}
    for _ in range(repeats):
        for name, pool in pools.items():
            calls = [batch.arguments(stack, i) for i in range(shape.num_layers)]
            seconds = batch.run(pool, calls)
            gmacs = len(calls) * tokens * shape.top_k * shape.expert_weights / seconds / 1e9
            found[name]["tokens_per_s"].append(tokens / seconds)
            found[name]["gmacs"].append(gmacs)
            found[name]["read_gbps"].append(meters[name].gbps())
    return found


def against(rows: list[dict[str, Any]]) -> str:
    """The last set's rate over that of the one before it, turn by turn: median and quartiles; "" for one."""
    if len(rows) < 2:
        return ""
    before, last = rows[-2], rows[-1]
    ratios = [a / b for a, b in zip(last["tokens_per_s"], before["tokens_per_s"], strict=True)]
    low, middle, high = common.quartiles(ratios)
    return f"{'':<22} {last['isa']} / {before['isa']}: {middle:.2f} ({low:.2f}-{high:.2f})"


def row_text(row: dict[str, Any]) -> str:
    """A line of the table: medians, with lower and upper quartiles of the rate."""
    low, middle, high = common.quartiles(row["tokens_per_s"])
    gmacs = common.quartiles(row["gmacs"])[1]
    rate = f"{middle:6.0f} ({low:.0f}-{high:.0f}) x {row['layers']} layers"
    return (
        f"{row['shape']:<16} {row['tiles']:<5} {row['isa']:<12} {row['threads']:3} {row['tokens']:6}  "
        f"{rate:<28} "
        f"{gmacs:<8.0f} {gmacs / row['threads']:<11.0f} {common.quartiles(row['read_gbps'])[1]:.1f}"
    )


@click.command(help=__doc__)
@common.common_options
@click.option("--tokens", default="512", show_default=True, callback=common.thread_counts, help="Batches.")
def main(
    shapes: list[str],
    layers: int,
    formats: str,
    isa: str,
    threads: list[int],
    repeats: int,
    json_path: Path | None,
    bundle_path: Path | None,
    tokens: list[int],
) -> None:
    """Prints a row a case: medians with lower and upper quartiles."""
    rows = []
    click.echo(
        f"{'shape':<16} {'tiles':<5} {'isa':<12} thr tokens  {'tok/s through the stack':<28} "
        f"{'GMAC/s':<8} {'per thread':<11} read GB/s"
    )
    for case in common.cases(shapes, layers, formats, bundle_path):
        stack = case.stack()
        names = common.instruction_sets(isa)
        for count in threads:
            with ExitStack() as opened:
                pools = {name: opened.enter_context(Pool(count, name)) for name in names}
                for num_tokens in tokens:
                    found = measure(pools, stack, num_tokens, repeats)
                    these = [
                        {"shape": case.shape.name, "tiles": case.tiles, "isa": name, "threads": count}
                        | {"layers": case.shape.num_layers, "tokens": num_tokens}
                        | samples
                        for name, samples in found.items()
                    ]
                    click.echo("\n".join(row_text(row) for row in these))
                    if ratio := against(these):
                        click.echo(ratio)
                    rows.extend(these)
        stack.close()
    common.write_json(json_path, "prefill", rows)


if __name__ == "__main__":
    main()
