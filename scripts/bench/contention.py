"""Stage ``contention``: the same decode alone, and beside one spinning process on every core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from scripts.bench.peers import Program, Work
from scripts.bench.record import Record
from scripts.bench.speed import Clock, Model, Plan, Say, execute, in_turn, line, on_the_cpu

STAGE = "contention"
TOKENS = 32
# Ends by itself if the benchmark is killed.
SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process that never waits, held to each core this process may use."""
    spinners = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(cpu)]) for cpu in sorted(os.sched_getaffinity(0))
    ]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def run_stage(
    record: Record, models: Sequence[Model], programs: Sequence[Program], plan: Plan, clock: Clock, say: Say
) -> bool:
    """Rounds of (alone, beside) for every program, on as many threads as the largest of the plan."""
    threads = max(plan.threads)
    programs = [on_the_cpu(program) for program in programs]
    for model in models[:1]:
        work = Work(model.name, model.bundle, model.gguf, threads, generate=(TOKENS,), repeats=plan.repeats)
        finished = _done(record, model.name, threads, programs)
        for number in range(plan.pairs):
            if number in finished:
                continue
            if not clock():
                return False
            for program in in_turn(programs, number):
                alone = execute(program, work, STAGE, number, plan.timeout_s)
                with busy_cores():
                    beside = execute(program, work, STAGE, number, plan.timeout_s)
                for name, runs in (("alone", alone), ("beside", beside)):
                    renamed = [replace(run, case=f"{run.case} {name}") for run in runs]
                    record.add(renamed)
                    say(line(renamed))
    return True


def _done(record: Record, model: str, threads: int, programs: Sequence[Program]) -> set[int]:
    held: dict[int, set[tuple[str, str]]] = {}
    for run in record.runs(STAGE):
        if run.model == model and run.threads == threads:
            held.setdefault(run.round, set()).add((run.subject, run.case))
    needed = {(program.name, f"tg{TOKENS} {name}") for program in programs for name in ("alone", "beside")}
    return {number for number, found in held.items() if needed <= found}
