"""Stages ``decode`` and ``prefill``: whole models, all programs in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from scripts.bench import process
from scripts.bench.machine import gpu_names
from scripts.bench.peers import Program, Work
from scripts.bench.record import Record, Run


@dataclass(frozen=True, slots=True)
class Model:
    """One model in every form: BF16 folder, the GGUF that all programs get, the bundle made from both."""

    name: str
    folder: Path
    gguf: Path
    bundle: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes common to the speed stages."""

    threads: tuple[int, ...]
    prompts: tuple[int, ...]
    generate: tuple[int, ...]
    pairs: int
    repeats: int
    timeout_s: float


T = TypeVar("T")
Say = Callable[[str], None]
Clock = Callable[[], bool]  # False once there is no time for another round


def execute(program: Program, work: Work, stage: str, number: int, timeout_s: float) -> list[Run]:
    """One invocation as runs, one a case. A failure gives the same runs with its error."""
    cases = [f"pp{count}" for count in work.prompts] + [f"tg{count}" for count in work.generate]
    common: dict[str, Any] = {"stage": stage, "model": work.model, "threads": work.threads}
    common |= {"subject": program.name, "round": number}
    if program.missing:
        return [Run(case=case, error=program.missing, **common) for case in cases]
    outcome = process.run(program.arguments(work), env=program.env, timeout_s=timeout_s)
    common |= outcome.facts
    error, parsed = outcome.error, None
    if not error:
        try:
            parsed = program.parse(outcome.output)
        except (ValueError, KeyError, TypeError) as problem:
            error = f"output not understood: {problem}"
    if parsed is None:
        return [Run(case=case, error=error, **common) for case in cases]
    return [
        Run(
            case=case,
            metrics=parsed.cases.get(case, {}),
            version=parsed.version,
            error="" if case in parsed.cases else "the program did not report this case",
            **common,
        )
        for case in cases
    ]


def done_rounds(record: Record, stage: str, work: Work, subjects: Sequence[str]) -> set[int]:
    """Rounds in which every subject has every case of the work: what a resumed stage skips."""
    wanted = {f"pp{count}" for count in work.prompts} | {f"tg{count}" for count in work.generate}
    held: dict[int, set[tuple[str, str]]] = {}
    for run in record.runs(stage):
        if run.model == work.model and run.threads == work.threads:
            held.setdefault(run.round, set()).add((run.subject, run.case))
    needed = {(subject, case) for subject in subjects for case in wanted}
    return {number for number, found in held.items() if needed <= found}


def run_stage(
    stage: str,
    record: Record,
    models: Sequence[Model],
    programs: Sequence[Program],
    plan: Plan,
    clock: Clock,
    say: Say,
) -> bool:
    """All rounds that the record lacks. Returns whether nothing is left to do."""
    programs = [on_the_cpu(program) for program in programs]
    for model in models:
        for threads in plan.threads:
            work = Work(model.name, model.bundle, model.gguf, threads, repeats=plan.repeats)
            parts = {
                "decode": replace(work, generate=plan.generate),
                # One sample is long enough; llama-bench runs every prompt once more to warm up.
                "prefill": replace(work, prompts=plan.prompts, repeats=1),
            }
            work = parts[stage]
            finished = done_rounds(record, stage, work, [program.name for program in programs])
            for number in range(plan.pairs):
                if number in finished:
                    continue
                if not clock():
                    return False
                for program in in_turn(programs, number):
                    runs = execute(program, work, stage, number, plan.timeout_s)
                    record.add(runs)
                    say(line(runs))
    return True


def on_the_cpu(program: Program) -> Program:
    """The same without any GPU in its sight: a build for GPUs would else use one unasked."""
    return replace(program, env={**program.env, "CUDA_VISIBLE_DEVICES": ""}) if gpu_names() else program


def in_turn(programs: Sequence[T], number: int) -> list[T]:
    """Every round begins with another program, so that none is always first."""
    first = number % len(programs)
    return [*programs[first:], *programs[:first]]


def line(runs: Sequence[Run]) -> str:
    """One invocation, for the terminal."""
    head = f"{runs[0].stage} {runs[0].model} {runs[0].threads} thr round {runs[0].round} {runs[0].subject:13}"
    parts = [
        f"{run.case} {run.error[:150]}"
        if run.error
        else f"{run.case} {max(run.metrics['tokens_per_s']):.1f} tok/s"
        for run in runs
    ]
    return f"{head} {', '.join(parts)}  (load {runs[0].load_1m:.1f}, {runs[0].wall_s:.1f} s)"
