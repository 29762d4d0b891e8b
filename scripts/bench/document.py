"""Writes the documents from the record alone: everything in them is measured, or a template below.

docs/BENCHMARKS.md begins with the reference table and repeats the main tables of the CPU stages, whose own
document lies below docs/measured/; the other stages have documents of their own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.bench import stats, tables
from scripts.bench.facts import REPOSITORY
from scripts.bench.goals import goals
from scripts.bench.hybrid import IK_FLAGS, LLAMA_ENV, LLAMA_FLAGS
from scripts.bench.peers import IK, KRASIS, LLAMA
from scripts.bench.plots import write_plots
from scripts.bench.record import FAMILIES, REFERENCE, STAGES, Record, Run
from scripts.bench.reference import section
from scripts.bench.reference.chart import write_chart
from scripts.bench.shown import without_places
from scripts.bench.tables import first_seen, pick, table
from scripts.bench.texts import INTRODUCTIONS, MARK, METHOD, TITLES

REPEATED = {"cpu-epyc.md": ("CPU alone", ("Decode", "Prefill on the CPU"))}
"""Sections of other documents that this one repeats: file, (title here, headings there)."""
RENDERERS: dict[str, Callable[[Sequence[Run]], str]] = {
    "decode": tables.speed_tables,
    "prefill": tables.speed_tables,
    "layer": tables.layer_tables,
    "contention": tables.contention_table,
    "convert": tables.convert_table,
    "quality": tables.quality_tables,
    "hybrid": tables.hybrid_tables,
    FAMILIES: tables.speed_tables,
}


def write_document(record: Record, out: Path, plots: Path | None) -> None:
    """Renders the record to out, with charts in plots if matplotlib is there."""
    runs = record.runs()
    charts = write_plots(runs, plots) if plots else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = {stage: _relative(path, out) for stage, path in charts.items()}
    if record.runs(REFERENCE):
        chart = (write_chart(record, plots) if plots else None) or _kept_chart(out)
        picture = _relative(chart, out) if chart else ""
        text = render_reference(record, picture, out.parent / "measured")
        if out.resolve() == REPOSITORY / "docs" / "BENCHMARKS.md":
            section.update_readme(record, REPOSITORY / "README.md", f"docs/{picture}" if picture else "")
    else:
        text = render(record, runs, pictures)
    out.write_text(without_places(text), "utf-8")


def render_reference(record: Record, picture: str, measured: Path) -> str:
    """The document that begins with the reference table. measured: the folder of the other documents."""
    parts = ["# Benchmarks", MARK, *section.sections(record, picture)]
    parts += [*section.elsewhere(record.path), _machine(record)]
    parts += [f"## Commands\n\n{_commands(record, record.runs(REFERENCE), (REFERENCE,))}"]
    parts += [_gaps(record, record.runs(REFERENCE), (REFERENCE,)) + section.cards_not_there(record)]
    for name, (title, wanted) in REPEATED.items():
        if (measured / name).exists():
            text = (measured / name).read_text("utf-8")
            whole = f"[measured/{name}](measured/{name})"
            parts.append(f"## {title}\n\nFrom {whole}, which has machine, method and commands.")
            parts += [f"#{found}" for heading in wanted if (found := _section_of(text, heading))]
    others = [f"- [measured/{path.name}](measured/{path.name})" for path in sorted(measured.glob("*.md"))]
    if others:
        parts.append("\n".join(["## All documents\n", *others]))
    return "\n\n".join(parts) + "\n"


def _section_of(text: str, heading: str) -> str:
    """A section of a document, its headings one level lower, without pictures; empty if it has none."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return ""
    lines = [line for line in found.group(0).strip().splitlines() if not line.startswith("![")]
    return "\n".join(f"#{line}" if line.startswith("### ") else line for line in lines)


def _kept_chart(out: Path) -> Path | None:
    """The chart of an earlier rendering, where matplotlib is not there now."""
    path = out.parent / "plots" / "reference.png"
    return path if path.exists() else None


def render(record: Record, runs: Sequence[Run], charts: dict[str, str]) -> str:
    """The whole document of the other stages. charts: a picture's path by stage."""
    parts = ["# Benchmarks", MARK, _machine(record), f"## Method\n\n{METHOD}", _programs(record, runs)]
    lines = goals(runs)
    if lines:
        heads = ["what", "wanted", "measured", "met"]
        parts.append(f"## Goals\n\n{table(heads, [goal.cells for goal in lines])}")
    for stage in (*STAGES, FAMILIES):
        mine = pick(runs, stage=stage)
        if not mine:
            continue
        section = [f"## {TITLES[stage]}", INTRODUCTIONS[stage], _when(mine, record), RENDERERS[stage](mine)]
        if stage in charts:
            section.append(f"![{TITLES[stage]}]({charts[stage]})")
        parts.append("\n\n".join(section))
    alone = {run.stage for run in runs} == {FAMILIES}
    gaps = _gaps(record, runs, (FAMILIES,) if alone else STAGES)
    parts += [gaps] if alone else [_hybrid_flags(), gaps]
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
    return f"## Programs and models\n\n{text}\n\n{_commands(record, runs, (*STAGES, FAMILIES))}"


def _source(sources: Mapping[str, object], subject: str) -> str:
    """Where a program comes from; ``kt-kernel q8_0`` from where ``kt-kernel`` does."""
    return next((str(sources[name]) for name in sources if f"{subject} ".startswith(f"{name} ")), "")


def _commands(record: Record, runs: Sequence[Run], stages: Sequence[str]) -> str:
    """The benchmark's own commands, and one command of every program and stage, as it was run."""
    lines = ["The benchmark was run by:", "", "```sh"]
    lines += first_seen(str(command) for command in record.facts("commands").values())
    lines += ["```", "", "It ran, for example (the record has every command):", "", "```sh"]
    for stage in stages:
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


def _gaps(record: Record, runs: Sequence[Run], stages: Sequence[str]) -> str:
    lines = [f"- Stage `{stage}` has not been run." for stage in stages if not pick(runs, stage=stage)]
    for stage in stages:
        mine = pick(runs, stage=stage)
        for problem in stats.errors(mine):
            alike = [run for run in mine if run.error == problem]
            cases = first_seen(f"{run.model} {run.case}" for run in alike)
            lines.append(f"- {stage}, {', '.join(tables.subjects(alike))}: {problem} ({'; '.join(cases)})")
    lines += [f"- {name}: {text}" for name, text in record.facts("gaps").items()]
    return "## What could not be measured here\n\n" + ("\n".join(lines) or "Nothing was left out.")


def _relative(path: Path, out: Path) -> str:
    """The picture as the document links to it."""
    target, base = path.resolve(), out.resolve().parent
    return str(target.relative_to(base)) if target.is_relative_to(base) else target.as_posix()
