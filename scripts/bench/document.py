"""Writes docs/BENCHMARKS.md from the record alone: everything in it is measured, or a template below."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import stats, tables
from bench.goals import goals
from bench.hybrid import IK_FLAGS, LLAMA_ENV, LLAMA_FLAGS
from bench.peers import IK, KRASIS, LLAMA
from bench.plots import write_plots
from bench.record import STAGES, Record, Run
from bench.tables import first_seen, pick, table
from bench.texts import INTRODUCTIONS, MARK, METHOD, TITLES

RENDERERS: dict[str, Callable[[Sequence[Run]], str]] = {
    "decode": tables.speed_tables,
    "prefill": tables.speed_tables,
    "layer": tables.layer_tables,
    "contention": tables.contention_table,
    "convert": tables.convert_table,
    "quality": tables.quality_tables,
    "hybrid": tables.hybrid_tables,
}


def write_document(record: Record, out: Path, plots: Path | None) -> None:
    """Renders the record to out, with charts in plots if matplotlib is there."""
    runs = record.runs()
    charts = write_plots(runs, plots) if plots else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = {stage: _relative(path, out) for stage, path in charts.items()}
    out.write_text(render(record, runs, pictures, _other_machines(out)), "utf-8")


def render(record: Record, runs: Sequence[Run], charts: dict[str, str], others: Sequence[str] = ()) -> str:
    """The whole document. charts: a picture's path by stage. others: what follows it."""
    parts = ["# Benchmarks", MARK, _machine(record), f"## Method\n\n{METHOD}", _programs(record, runs)]
    lines = goals(runs)
    if lines:
        heads = ["what", "wanted", "measured", "met"]
        parts.append(f"## Goals\n\n{table(heads, [goal.cells for goal in lines])}")
    for stage in STAGES:
        mine = pick(runs, stage=stage)
        if not mine:
            continue
        section = [f"## {TITLES[stage]}", INTRODUCTIONS[stage], _when(mine, record), RENDERERS[stage](mine)]
        if stage in charts:
            section.append(f"![{TITLES[stage]}]({charts[stage]})")
        parts.append("\n\n".join(section))
    parts += [_hybrid_flags(), _gaps(record, runs), *others]
    return "\n\n".join(parts) + "\n"


def _machine(record: Record) -> str:
    facts = record.facts("machine")
    rows = [[name.replace("_", " "), str(facts[name])] for name in facts]
    return "## Machine\n\n" + (table(["", ""], rows).replace("---:", "---") if rows else "Not recorded.")


def _programs(record: Record, runs: Sequence[Run]) -> str:
    rows = []
    sources = record.facts("programs")
    for subject in tables.subjects(run for run in runs if run.stage != "quality"):
        mine = pick(runs, subject=subject)
        versions = first_seen(run.version for run in mine if run.version)
        rows.append([subject, "; ".join(versions) or tables.ABSENT, _source(sources, subject)])
    text = table(["program", "version it reports", "where it comes from"], rows).replace("---:", "---")
    models = record.facts("models")
    if models:
        text += "\n\n" + table(["model", "what it is"], [[k, str(v)] for k, v in models.items()]).replace(
            "---:", "---"
        )
    return f"## Programs and models\n\n{text}\n\n{_commands(record, runs)}"


def _source(sources: Mapping[str, object], subject: str) -> str:
    """Where a program comes from; ``kt-kernel q8_0`` from where ``kt-kernel`` does."""
    return next((str(sources[name]) for name in sources if f"{subject} ".startswith(f"{name} ")), "")


def _commands(record: Record, runs: Sequence[Run]) -> str:
    """The benchmark's own commands, and one command of every program and stage, as it was run."""
    lines = ["The benchmark was run by:", "", "```sh"]
    lines += first_seen(str(command) for command in record.facts("commands").values())
    lines += ["```", "", "It ran, for example (the record has every command):", "", "```sh"]
    for stage in STAGES:
        for subject in tables.subjects(pick(runs, stage=stage)):
            ran = [run.command for run in pick(runs, stage=stage, subject=subject) if run.command]
            lines += [f"{ran[-1]}   # {stage}, {subject}"] if ran else []
    return "\n".join([*lines, "```"])


def _when(runs: Sequence[Run], record: Record) -> str:
    timed = [run for run in runs if run.started_s]
    if not timed:
        return ""
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(f(run.started_s for run in timed))) for f in (min, max)
    )
    rounds = len({run.round for run in timed})
    load = max(run.load_1m for run in timed)
    plural = "" if rounds == 1 else "s"
    return f"{first} to {last} UTC, {rounds} round{plural}; load before a run at most {load:.1f}."


def _hybrid_flags() -> str:
    env = " ".join(f"{name}={value}" for name, value in LLAMA_ENV.items())
    rows = [
        [KRASIS, "`krasis_runner.py --gpus N`: what `krasis-run --device cuda --gpus N` does"],
        [LLAMA, f"`{env} llama-bench {' '.join(LLAMA_FLAGS)}`"],
        [IK, f"`llama-bench {' '.join(IK_FLAGS)}`"],
    ]
    text = table(["program", "flags"], rows).replace("---:", "---")
    return (
        f"## Flags for 1, 2 and 3 GPUs\n\nUsed by `--gpus 1,2,3` (CUDA_VISIBLE_DEVICES picks them).\n\n{text}"
    )


def _gaps(record: Record, runs: Sequence[Run]) -> str:
    lines = [f"- Stage `{stage}` has not been run." for stage in STAGES if not pick(runs, stage=stage)]
    for stage in STAGES:
        mine = pick(runs, stage=stage)
        for problem in stats.errors(mine):
            alike = [run for run in mine if run.error == problem]
            cases = first_seen(f"{run.model} {run.case}" for run in alike)
            lines.append(f"- {stage}, {', '.join(tables.subjects(alike))}: {problem} ({'; '.join(cases)})")
    lines += [f"- {name}: {text}" for name, text in record.facts("gaps").items()]
    return "## What could not be measured here\n\n" + ("\n".join(lines) or "Nothing was left out.")


def _other_machines(out: Path) -> list[str]:
    """Documents of the same kind beside this one."""
    beside = sorted(path.name for path in out.parent.glob("BENCHMARKS*.md") if path.name != out.name)
    links = "\n".join(f"- [{name}]({name})" for name in beside)
    return [f"## Other machines\n\n{links}"] if links else []


def _relative(path: Path, out: Path) -> str:
    """The picture as the document links to it."""
    target, base = path.resolve(), out.resolve().parent
    return str(target.relative_to(base)) if target.is_relative_to(base) else target.as_posix()
