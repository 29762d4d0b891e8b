"""Compares two source trees of Krasis in lockstep: is one slower than the other?

    python -m scripts.bench_trees OLD NEW BUNDLE --threads 1 --threads 2
    python -m scripts.bench_trees OLD NEW BUNDLE --device cuda --vram-gib 8 --threads 16 --prompt 10000

OLD and NEW are working trees with ``build/typing/krasis`` (links to convert, formats and runtime) and a built
native library; BUNDLE is one that both open. Each tree runs in a process of its own, and the two take turns,
a few tokens each: what changes slowly on a machine (clock rates, neighbours, the speed of its memory) meets
both alike, and the mapped weights are the same pages of memory. Printed are the medians over the turns of
new's time over old's, so less than 1 is faster, with the quartiles.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

_SPARE_TOKENS = 64

_WORKER = """
import json, sys, time
from krasis.runtime import Engine, EngineSettings
bundle, threads, device, context, vram_bytes = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
settings = EngineSettings(
    context=int(context), threads=threads, device=device, vram_bytes=int(vram_bytes) or None, prefault=True
)
with Engine.open(bundle, settings) as engine:
    if device == "cpu":
        engine.wait_until_read()
    else:
        print(engine.description, file=sys.stderr)
    for line in sys.stdin:
        name, count = json.loads(line)
        began = time.perf_counter()
        if name == "prefill":
            engine.reset()
            engine.prefill([i * 7919 % 1000 for i in range(count)])
        else:
            for i in range(count):
                engine.decode(i * 7919 % 1000)
        print(time.perf_counter() - began, flush=True)
"""


class Tree:
    """One source tree's process. options: of its engine, in the worker's order."""

    def __init__(self, root: Path, bundle: Path, options: Sequence[object]) -> None:
        environment = dict(
            os.environ,
            PYTHONPATH=str(root / "build" / "typing"),
            KRASIS_LIB_DIR=str(_library(root)),
            OMP_NUM_THREADS="1",
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(bundle), *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
        )

    def take(self, name: str, count: int) -> float:
        """Seconds of one turn. name: "prefill" of count tokens from the start, or "decode" of count more."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise click.ClickException("a tree's process has no pipes")
        stdin.write(json.dumps([name, count]) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise click.ClickException(f"a tree's process ended (code {self._process.wait()})")
        return float(answer)

    def end(self) -> None:
        """Ends the process."""
        self._process.communicate()


@click.command(help=__doc__)
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--turns", default=100, show_default=True, help="Turns of decoding for each tree.")
@click.option("--tokens", default=4, show_default=True, help="Tokens decoded in a turn.")
@click.option("--prefills", default=6, show_default=True, help="Prefills for each tree.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of a prefill.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--vram-gib", type=float, default=0.0, help="VRAM that each may use.  [default: by itself]")
@click.option("--new-vram-gib", type=float, help="VRAM that NEW may use, where its limit counts more.")
def main(
    old: Path,
    new: Path,
    bundle: Path,
    threads: tuple[int, ...],
    turns: int,
    tokens: int,
    prefills: int,
    prompt: int,
    device: str,
    vram_gib: float,
    new_vram_gib: float | None,
) -> None:
    """The whole comparison."""
    context = max(2048, prompt + tokens * turns + _SPARE_TOKENS)
    for count in threads:
        limits = (vram_gib, vram_gib if new_vram_gib is None else new_vram_gib)
        pair = [
            Tree(root.resolve(), bundle.resolve(), (count, device, context, round(gib * 2**30)))
            for root, gib in zip((old, new), limits, strict=True)
        ]
        for tree in pair:
            tree.take("prefill", 64)
        _say(f"prefill {prompt}, {count} threads", _turns(pair, "prefill", prompt, prefills))
        _say(f"decode, {count} threads", _turns(pair, "decode", tokens, turns))
        for tree in pair:
            tree.end()


def _turns(pair: list[Tree], name: str, count: int, turns: int) -> list[tuple[float, float]]:
    """Seconds of old and new, turn by turn; who goes first changes."""
    found = []
    for turn in range(turns):
        times = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side] = pair[side].take(name, count)
        found.append((times[0], times[1]))
    return found


def _say(title: str, times: list[tuple[float, float]]) -> None:
    low, middle, high = statistics.quantiles([new / old for old, new in times], n=4)
    least = [min(side) * 1e3 for side in zip(*times, strict=True)]
    click.echo(
        f"{title}: new/old {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(times)} turns; "
        f"least {least[0]:.1f} and {least[1]:.1f} ms a turn)"
    )


def _library(root: Path) -> Path:
    """The folder of the tree's native library, the newest if there are several builds."""
    built = sorted(root.resolve().glob("build/*/csrc/libkrasis_cpu.so"), key=lambda one: one.stat().st_mtime)
    if not built:
        raise click.ClickException(f"{root}: no build/*/csrc/libkrasis_cpu.so; build it with CMake first")
    return built[-1].parent


if __name__ == "__main__":
    main()
