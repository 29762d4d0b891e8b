"""The ``krasis-convert`` command."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from krasis.convert.conversion import (
    Prepared,
    Summary,
    check_output,
    check_room,
    convert,
    dry_run,
    prepare,
)
from krasis.convert.hub.inputs import is_begun, local_texts, opened_inputs, parse_inputs
from krasis.convert.partial import partial_path
from krasis.convert.plan_text import describe_plan
from krasis.convert.progress import Reporter
from krasis.convert.refresh_cli import run_refresh
from krasis.convert.settings import (
    AUTO,
    GPU_GROUPS,
    TIERS,
    ConvertSettings,
    parse_tiers,
)
from krasis.formats.bundle.shard_output import OUTPUT_IO
from krasis.formats.errors import KrasisError, ResourceError, UsageError
from krasis.formats.files import mapping_guard
from krasis.formats.files.file_ops import refusal
from krasis.formats.layouts import CPU_FORMATS, GPU_FORMATS
from krasis.formats.printable import printable_lines
from krasis.formats.process.command_line import StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.standard_streams import write_output
from krasis.formats.process.stop_signals import INTERRUPTED, ends_in_order
from krasis.formats.units import format_bytes, format_seconds, parse_bytes

JSON_VERSION = 1
_WHEN_CUT = "get this file again; what is finished so far is kept, and the same command goes on from there"


@click.command(cls=StreamsCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", nargs=-1, required=True, metavar="[MODEL] [GGUF]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write.")
@click.option(
    "--refresh-text",
    metavar="SOURCE",
    help="Put the tokenizer, chat template and defaults of SOURCE (a folder, a GGUF, one file or a name on "
    "the hub) into a finished bundle: krasis-convert --refresh-text SOURCE model.krasis.",
)
@click.option(
    "--gpu-format",
    type=click.Choice(list(GPU_FORMATS)),
    default=None,
    help="[default: marlin, or mxfp4 for experts that are in MXFP4, or were released in it]",
)
@click.option("--gpu-bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option(
    "--gpu-group",
    type=click.Choice(list(GPU_GROUPS)),
    default=None,
    help="Input features that share a scale [default: 128, or the most below that divide the model's sizes "
    "and the groups of 4-bit codes that are kept].",
)
@click.option("--gpu-scales", type=click.Choice(["bf16", "f16"]), default="bf16", show_default=True)
@click.option(
    "--cpu-format",
    type=click.Choice(list(CPU_FORMATS)),
    default=None,
    help="[default: q8, or mxfp4 or int4 for experts that the source has in such codes, which they keep]",
)
@click.option(
    "--tiers",
    metavar="TIERS",
    help="Copies of the experts to write: gpu, cpu or both (gpu,cpu). "
    "[default: both that can hold the model]",
)
@click.option("--shard-size", default="32GiB", show_default=True, help="Largest file of the bundle.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Packing threads [default: all CPUs].")
@click.option("--memory-limit", default=None, help="Bound on memory beyond the page cache, such as 2GiB.")
@click.option(
    "--output-io",
    type=click.Choice(list(OUTPUT_IO)),
    default="auto",
    show_default=True,
    help="direct: past the page cache; buffered: through it, which may leave the bundle in memory; auto: "
    "direct where the file system can.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), default=None, help="HDF5 file of importance weights."
)
@click.option(
    "--drop-sources",
    is_flag=True,
    help="Download models named on the hub piece by piece while they are converted, and keep no source.",
)
@click.option(
    "--mtp",
    is_flag=True,
    help="Take the layer for multi-token prediction, too: krasis-run drafts with it.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing bundle (at the very end, atomically).")
@click.option(
    "--force-text",
    is_flag=True,
    help="Go on without a tokenizer, a chat template or settings that cannot be used.",
)
@click.option(
    "--force-weights",
    is_flag=True,
    help="Convert weights that look damaged (long stretches of zeros, values no scale can hold) as they are.",
)
@click.option(
    "--resume/--restart",
    "resume",
    default=True,
    help="Continue a matching unfinished conversion (default), or discard it.",
)
@click.option(
    "--verify/--no-verify",
    default=False,
    help="Read everything back from the disk and compare checksums. A sample is always compared.",
)
@click.option("-q", "--quiet", is_flag=True, help="Errors and quality notes only.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary (or the plan) as JSON on stdout.")
@version_option()
@last_resort("krasis-convert")
@ends_in_order("")
def main(
    inputs: tuple[str, ...],
    output: Path | None,
    refresh_text: str | None,
    *,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a mixture-of-experts checkpoint into a bundle that krasis-run starts from at once.

    Give a Hugging Face folder (BF16), a GGUF, or both in any order, or their names on the hub: org/model,
    org/model@revision, org/model-GGUF:Q8_0. With both, GPU experts and everything else come from the
    checkpoint and CPU experts from the GGUF (Q8_0 without loss). The same command continues an interrupted
    run.
    """
    try:
        reporter = Reporter(0 if options["quiet"] else 2 if options["verbose"] else 1)
        if refresh_text is not None:
            paths = [Path(one) for one in inputs]
            texts = local_texts(refresh_text)
            run_refresh(texts, paths, output, options, reporter, plan_only=dry_run, as_json=as_json)
            return
        if output is None:
            raise UsageError("the bundle to write is missing", hint="name it by -o model.krasis")
        settings, drop = _settings(options), options["drop_sources"]
        _run(inputs, output, settings, reporter, plan_only=dry_run, as_json=as_json, drop_sources=drop)
    except KeyboardInterrupt:
        held = output is not None and not dry_run and is_begun(output)
        text = "run the same command to continue" if held else "nothing was written"
        print(f"krasis-convert: stopped; {text}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KrasisError as error:
        _fail(error)
    except OSError as error:
        _fail(refusal(error))
    except MemoryError:
        _fail(ResourceError("out of memory", hint="use --memory-limit or fewer --threads"))


def _settings(options: dict[str, Any]) -> ConvertSettings:
    limit = options["memory_limit"]
    return ConvertSettings(
        tiers=TIERS if options["tiers"] is None else parse_tiers(options["tiers"]),
        gpu_bits=8 if options["gpu_bits"] == "8" else 4,
        gpu_format=options["gpu_format"] or AUTO,
        gpu_group="auto" if options["gpu_group"] is None else GPU_GROUPS[options["gpu_group"]],
        gpu_scales=options["gpu_scales"],
        cpu_format=options["cpu_format"] or AUTO,
        shard_bytes=parse_bytes(options["shard_size"], "--shard-size"),
        calibration=options["calibration"],
        mtp=options["mtp"],
        num_threads=options["threads"],
        output_io=options["output_io"],
        memory_limit_bytes=None if limit is None else parse_bytes(limit, "--memory-limit"),
        replace=options["force"],
        restart=not options["resume"],
        full_verify=options["verify"],
        force_text=options["force_text"],
        force_weights=options["force_weights"],
    )


def _run(
    inputs: tuple[str, ...],
    output: Path,
    settings: ConvertSettings,
    reporter: Reporter,
    *,
    plan_only: bool,
    as_json: bool,
    drop_sources: bool,
) -> None:
    mapping_guard.install("krasis-convert", hint=_WHEN_CUT)
    named = parse_inputs(inputs)
    if not all(isinstance(one, Path) for one in named):
        check_output(output, (), settings)  # before any download
    with opened_inputs(
        named, output, reporter, restart=settings.restart, plan_only=plan_only, drop=drop_sources
    ) as (paths, streamed):
        prepared = prepare(paths, output, settings, reporter, streamed)
        _carry_out(prepared, reporter, plan_only=plan_only, as_json=as_json)


def _carry_out(prepared: Prepared, reporter: Reporter, *, plan_only: bool, as_json: bool) -> None:
    if plan_only:
        plan = dry_run(prepared)
        if as_json:
            plan_record = {"krasis_convert": JSON_VERSION, **asdict(plan)}
            write_output(json.dumps(plan_record, indent=2, default=str) + "\n")
        else:
            write_output(printable_lines("\n".join(describe_plan(plan))) + "\n")
        check_room(prepared)  # the plan is told either way; the exit code says whether it can be done
        return
    try:
        summary = convert(prepared, reporter)
    except KrasisError:
        if partial_path(prepared.out).exists():
            reporter.warn(f"what is finished so far is kept in {partial_path(prepared.out)}")
        raise
    for line in _describe(summary):
        reporter.say(line)
    if as_json:
        record = {"krasis_convert": JSON_VERSION, **asdict(summary), "gb_per_s": summary.gb_per_s}
        write_output(json.dumps(record, indent=2, default=str) + "\n")


def _describe(summary: Summary) -> list[str]:
    if summary.was_complete:
        return [f"{summary.out} is complete already: it was made of these inputs with these settings"]
    tiers = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in summary.tier_bytes.items())
    width = max(len(kind) for kind in summary.quality)
    return [
        f"{summary.out}: {format_bytes(summary.total_bytes)} ({tiers})",
        f"{format_bytes(summary.source_bytes)} of source in {format_seconds(summary.elapsed_s)}, "
        f"{summary.gb_per_s:.2f} GB/s; peak memory {format_bytes(summary.peak_bytes)} beyond the page cache",
        "relative squared error after quantisation:",
        *(f"  {kind:{width}s}  {100 * row['relative_mse']:.4f} %" for kind, row in summary.quality.items()),
        f"next: krasis-run {summary.out}",
    ]


def _fail(error: KrasisError) -> None:
    print(f"krasis-convert: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
