"""One command for everything: measures what the record lacks, then writes the document from the record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from scripts.bench import contention, convert, families, hybrid, layer, process, provision, quality, speed
from scripts.bench.document import write_document
from scripts.bench.facts import REPOSITORY, note_facts, note_programs
from scripts.bench.machine import load_1m
from scripts.bench.peers import IK, KT, LLAMA, Krasis, Program, ik_llama_cpp, llama_cpp
from scripts.bench.record import FAMILIES, REFERENCE, STAGES, Record
from scripts.bench.reference import command as reference
from scripts.bench.speed import Model, Plan

TINY = REPOSITORY / "tests" / "assets" / "tiny-qwen3-moe"
PATH = click.Path(path_type=Path)
BUSY_LOAD = 0.7


def numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """A click callback: comma-separated numbers."""
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter("wants numbers such as 1,2") from error


def stages(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """A click callback: names of stages, or ``all``."""
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    chosen = STAGES if names == ("all",) else names
    known = (*STAGES, FAMILIES, REFERENCE)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise click.BadParameter(f"{unknown or 'nothing'}; there are {', '.join(known)}")
    if REFERENCE in chosen and len(chosen) > 1:
        raise click.BadParameter(f"{REFERENCE} takes the whole machine: run it by itself")
    return chosen


def models(
    folders: tuple[Path, ...], ggufs: tuple[Path, ...], bundles: tuple[Path, ...], work: Path
) -> list[Model]:
    """The n-th folder, GGUF and bundle belong together; bundles may be left out and are then made."""
    if len(ggufs) != len(folders) or len(bundles) not in (0, len(folders)):
        raise click.UsageError("give --model, --gguf and (if at all) --bundle the same number of times")
    found = []
    for index, (folder, gguf) in enumerate(zip(folders, ggufs, strict=True)):
        for path in (folder, gguf):
            if not path.exists():
                raise click.UsageError(f"{path} is not there")
        bundle = bundles[index] if bundles else work / f"{folder.name}.krasis"
        found.append(Model(folder.name, folder, gguf, bundle))
    return found


def make_bundle(model: Model, for_gpus: bool) -> None:
    """Converts the folder and that GGUF, unless the bundle is there. Without GPUs: CPU experts alone."""
    if (model.bundle / "manifest.json").exists():
        return
    click.echo(f"converting {model.name} ...")
    command = [convert.tool("krasis-convert"), str(model.folder), str(model.gguf), "-o", str(model.bundle)]
    tiers = [] if for_gpus else ["--tiers", "cpu"]
    outcome = process.run([*command, *tiers, "--quiet"], timeout_s=24 * 3600)
    if outcome.error:
        raise click.ClickException(f"{outcome.command}: {outcome.error}")


_OPTIONS = (
    click.option("--model", "folders", multiple=True, type=PATH, help="BF16 folder; may be repeated."),
    click.option("--gguf", "ggufs", multiple=True, type=PATH, help="The Q8_0 GGUF of each model."),
    click.option("--bundle", "bundles", multiple=True, type=PATH, help="Its bundle [default: made]."),
    click.option("--llama-bench", "llama", default="auto", help="PATH, auto (built from an sdist) or off."),
    click.option("--ik-llama-bench", "ik", default="off", help="PATH of the one you built."),
    click.option("--kt-kernel", "kt", default="auto", help="auto (its wheel), off, or a folder with it."),
    click.option("--llama-quantize", "quantize", default="auto", help="PATH; auto: beside llama-bench."),
    click.option("--krasis-isa", default="auto", help="auto, avx2, or both by a comma."),
    click.option("--threads", default="1,2", show_default=True, callback=numbers),
    click.option("--prompt", default="512,2048", show_default=True, callback=numbers),
    click.option("--generate", default="64", show_default=True, callback=numbers),
    click.option("--gpus", default="0", show_default=True, callback=numbers, help="Such as 0,1,2,3."),
    click.option("--pairs", default=5, show_default=True, type=click.IntRange(1), help="Rounds of each."),
    click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Samples a round."),
    click.option(
        "--family",
        "families",
        multiple=True,
        type=click.Choice([cut.name for cut in families.CUTS]),
        help=f"For {FAMILIES}: only this model; may be repeated.",
    ),
    click.option("--quality-model", default=TINY, type=PATH, help="Trained BF16 folder with heldout.txt."),
    click.option(
        "--stage",
        "chosen",
        default="all",
        show_default=True,
        callback=stages,
        help=", ".join((*STAGES, FAMILIES, REFERENCE)),
    ),
    click.option("--restart", is_flag=True, help="Measure the chosen stages anew."),
    click.option("--budget-s", default=0.0, help="Start no round after so many seconds; run again to go on."),
    click.option("--timeout-s", default=1800.0, show_default=True, help="For one program."),
    click.option("--work", type=PATH, default=Path("build/bench"), show_default=True, help="Scratch files."),
    click.option("--record", "record_path", type=PATH, default=Path("bench.h5"), show_default=True),
    click.option(
        "--out",
        type=PATH,
        help="The document [default: docs/BENCHMARKS.md for reference, else docs/measured/bench.md].",
    ),
    click.option("--plots", type=PATH, help="Folder for PNG charts (needs matplotlib)."),
    *reference.OPTIONS,
)


def options(command: Any) -> Any:
    """Everything that can be chosen."""
    for option in _OPTIONS:
        command = option(command)
    return command


@click.command(help=__doc__)
@click.argument("action", type=click.Choice(["run", "render"]), default="run")
@options
def main(action: str, record_path: Path, out: Path | None, plots: Path | None, **given: Any) -> None:
    record = Record(record_path)
    if out is None:
        is_reference = record.runs(REFERENCE) if action == "render" else given["chosen"] == (REFERENCE,)
        out = REPOSITORY / "docs" / ("BENCHMARKS.md" if is_reference else "measured/bench.md")
    if action == "run":
        finished = measure(record, **given)
        click.echo(
            "all chosen stages are complete" if finished else "time is up: run the same command to go on"
        )
    write_document(record, out, plots)
    click.echo(f"{out} written from {record_path}")


def measure(record: Record, *, chosen: tuple[str, ...], restart: bool, budget_s: float, **given: Any) -> bool:
    """Runs the chosen stages. Returns whether all are complete."""
    begin, work = time.monotonic(), Path(given["work"])
    work.mkdir(parents=True, exist_ok=True)
    if chosen == (REFERENCE,):
        if restart:
            record.drop(REFERENCE)
        return reference.run(record, given, budget_s, click.echo)
    found = models(given["folders"], given["ggufs"], given["bundles"], work)
    if restart:
        for stage in chosen:
            record.drop(stage)
    bench = provision.Found(None, "no stage that needs it was chosen")
    if set(chosen) - {"layer"}:  # building it takes minutes
        bench = provision.llama_bench(given["llama"], work)
    ik = provision.given(given["ik"], "--ik-llama-bench")
    programs: list[Program] = [
        Krasis(name="krasis" if isa == "auto" else f"krasis ({isa})", isa=isa)
        for isa in given["krasis_isa"].split(",")
    ]
    programs += [llama_cpp(bench.path, bench.missing), ik_llama_cpp(ik.path, ik.missing)]
    for model in found:
        make_bundle(model, any(given["gpus"]))
    note_facts(record, chosen, found, {LLAMA: bench, IK: ik} if set(chosen) - {"layer"} else {})
    plan = Plan(
        given["threads"],
        given["prompt"],
        given["generate"],
        given["pairs"],
        given["repeats"],
        given["timeout_s"],
    )
    context = Context(record, found, programs, plan, given, work, bench.path)
    return all(
        run_stage(stage, context, lambda: not budget_s or time.monotonic() - begin < budget_s)
        for stage in chosen
    )


class Context:
    """What the stages need of the command line."""

    def __init__(
        self,
        record: Record,
        models: list[Model],
        programs: list[Program],
        plan: Plan,
        given: dict[str, Any],
        work: Path,
        llama_bench: Path | None,
    ) -> None:
        self.record, self.models, self.programs, self.plan = record, models, programs, plan
        self.given, self.work = given, work
        beside = None if llama_bench is None else llama_bench.with_name("llama-quantize")
        self.quantize = (
            provision.Found(beside)
            if given["quantize"] == "auto"
            else provision.given(given["quantize"], "--llama-quantize")
        )


def run_stage(stage: str, context: Context, clock: speed.Clock) -> bool:
    """One stage; says first if the machine is busy."""
    if (load := load_1m()) > BUSY_LOAD:
        click.echo(f"{stage}: the machine is busy (load {load:.1f}); the record says so", err=True)
    c = context
    if stage in ("decode", "prefill"):
        return speed.run_stage(stage, c.record, c.models, c.programs, c.plan, clock, click.echo)
    if stage == "contention":
        return contention.run_stage(c.record, c.models, c.programs, c.plan, clock, click.echo)
    if stage == "layer":
        kt = provision.kt_kernel(c.given["kt"], c.work)
        note_programs(c.record, {KT: kt})
        return layer.run_stage(c.record, c.models, kt, c.plan, clock, click.echo)
    if stage == "convert":
        return convert.run_stage(c.record, c.models, c.quantize, c.plan, c.work, clock, click.echo)
    if stage == FAMILIES:
        chosen = [cut for cut in families.CUTS if cut.name in (c.given["families"] or {cut.name})]
        return families.run_stage(c.record, chosen, c.programs, c.plan, c.work, clock, click.echo)
    if stage == "quality":
        return quality.run_stage(c.record, c.given["quality_model"], c.quantize, c.work, clock, click.echo)
    return hybrid.run_stage(
        c.record, c.models, c.programs, c.given["gpus"], c.quantize, c.plan, c.work, clock, click.echo
    )
