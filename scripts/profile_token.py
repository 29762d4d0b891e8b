#!/usr/bin/env python3
"""Where the time of a token goes: microseconds per stage of prefill and decode, from the engine's own calls.

Every native call is timed on its way through the engine; what lies between the calls is "outside the
kernels", the timing itself included (1 to 2 us a call). Times are medians over the repetitions, by the wall
clock or (--cpu) by the processor time of the caller's thread, which other work on the machine does not
lengthen. Example:

    python -m scripts.profile_token model.krasis --tokens 512 --threads 1,2
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.backend import CpuBackend
from krasis.runtime.cpu.kernels import NativeFunction

OUTSIDE = "outside the kernels"
WARM_UP_TOKENS = 3

Clock = Callable[[], float]
Pass = dict[str, float]  # seconds by stage


class StageClock:
    """Adds up the seconds of every native call by stage."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: NativeFunction) -> NativeFunction:
        """The function, timed."""
        clock = self._clock

        def timed(*arguments: Any) -> int:
            begin = clock()
            status = function(*arguments)
            self.seconds[self._stage(name, arguments)] += clock() - begin
            return status

        return timed

    def _stage(self, name: str, arguments: tuple[Any, ...]) -> str:
        short = name.removeprefix("krasis_")
        if short == "gemm_int8_rows":
            *_, rows, _, _, accumulate = arguments
            return f"gemm_int8_rows: {rows} rows" + (", added" if accumulate else "")
        return {"gemm_float": "gemm_float: router", "moe": "moe: experts"}.get(short, short)

    def measure(self, work: Callable[[], object]) -> Pass:
        """Seconds by stage of one piece of work; OUTSIDE is the rest."""
        self.seconds.clear()
        begin = self._clock()
        work()
        total = self._clock() - begin
        return {**self.seconds, OUTSIDE: total - sum(self.seconds.values())}


def medians(passes: list[Pass]) -> Pass:
    """The median of every stage, largest first."""
    stages = {stage: statistics.median(one.get(stage, 0.0) for one in passes) for stage in passes[0]}
    return dict(sorted(stages.items(), key=lambda item: -item[1]))


def profile(engine: Engine, stages: StageClock, tokens: int, repeats: int) -> dict[str, Pass]:
    """Median seconds by stage of a prompt of `tokens` tokens, and of a token decoded after it."""
    rng = np.random.default_rng(5)
    vocab = engine.bundle.spec.vocab
    prompts, decoded = [], []
    for repeat in range(repeats + 1):
        engine.reset()
        prompt = rng.integers(0, vocab, tokens).tolist()
        taken = stages.measure(lambda ids=prompt: engine.prefill(ids))
        for step in range(WARM_UP_TOKENS + 8):
            token = int(rng.integers(0, vocab))
            one = stages.measure(lambda id_=token: engine.decode(id_))
            if repeat and step >= WARM_UP_TOKENS:
                decoded.append(one)
        if repeat:
            prompts.append(taken)
    return {"prefill": medians(prompts), "decode": medians(decoded)}


def print_table(title: str, stages: Pass, tokens: int) -> None:
    """Microseconds a token and fractions, a line per stage."""
    total = sum(stages.values())
    click.echo(f"{title}: {tokens / total:.1f} tok/s, {total / tokens * 1e6:.1f} us a token")
    for stage, seconds in stages.items():
        click.echo(f"  {stage:<34} {seconds / tokens * 1e6:10.1f} us  {100 * seconds / total:5.1f} %")


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=512, show_default=True, type=click.IntRange(1), help="Of the prompt.")
@click.option("--threads", default="1", show_default=True, help="Numbers, separated by commas.")
@click.option("--isa", default="auto", show_default=True)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--cpu", is_flag=True, help="Processor time of the caller's thread, for one thread.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the medians there.")
def main(
    bundle: Path, tokens: int, threads: str, isa: str, repeats: int, cpu: bool, json_path: Path | None
) -> None:
    """Prints two tables per number of threads."""
    records = []
    for count in [int(one) for one in threads.split(",")]:
        settings = EngineSettings(threads=count, isa=isa, context=tokens + 64)
        with Engine.open(bundle, settings) as engine:
            backend = engine._backend
            if not isinstance(backend, CpuBackend):
                raise click.ClickException(f"nothing to profile in {engine.description}")
            stages = StageClock(time.thread_time if cpu else time.perf_counter)
            backend.watch(stages.wrap)
            found = profile(engine, stages, tokens, repeats)
            click.echo(engine.description)
            print_table(f"prefill of {tokens} tokens", found["prefill"], tokens)
            print_table(f"decode after {tokens} tokens", found["decode"], 1)
            records.append({"threads": count, "isa": isa, "tokens": tokens, "cpu_time": cpu, **found})
    if json_path is not None:
        json_path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
