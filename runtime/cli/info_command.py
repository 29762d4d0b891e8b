"""``krasis-info``: what is in a bundle, what it needs, whether it is intact, and what a machine would do with
it.

Only click is imported at the top, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import click

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.printable import printable_lines
from krasis.formats.process.command_line import StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.standard_streams import check_stdout, write_output
from krasis.formats.process.stop_signals import INTERRUPTED, ends_in_order

if TYPE_CHECKING:
    from krasis.formats.bundle.manifest import Manifest
    from krasis.formats.bundle.verify import Problem
    from krasis.runtime.cli.info_source import PlannedModel
    from krasis.runtime.planning.sizes import ModelSizes

_Command = TypeVar("_Command", bound=Callable[..., Any])

JSON_VERSION = 1
_HEADINGS = {
    "damaged": "DAMAGED",
    "changed": "CHANGED while it was checked, so that nothing is known",
    "unreadable": "NOT CHECKED: the system does not let it be read",
}


@dataclass(frozen=True, slots=True)
class _Request:
    """The command line. Sizes and GPU lists are still text."""

    bundle: str | None
    as_json: bool
    tensors: bool
    verify: bool
    plan: bool
    env: bool
    shape: str | None
    gpus: str | None
    gpu: str | None
    memory: str | None
    cpu_format: str | None
    gpu_group: str | None
    pcie_gbps: float | None
    gpu_gbps: float | None
    gpu_tflops: float | None
    ram: str | None
    ram_gbps: float | None
    cpus: int | None
    cpu_gmacs: float | None
    disk_gbps: float | None
    context: int | None
    prompt_tokens: int | None
    kv_dtype: str


def _positive(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """click's FloatRange lets NaN and infinity pass."""
    if value is not None and not 0 < value < float("inf"):
        raise click.BadParameter("not a positive number", param=parameter)
    return value


def _rate(flag: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(flag, type=float, callback=_positive, help=text)


_AT_LEAST_1 = click.IntRange(min=1)


@click.command(
    cls=StreamsCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("bundle", required=False, metavar="[BUNDLE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, every size in bytes.")
@click.option(
    "--tensors", is_flag=True, help="List every blob: tier, dtype, shape, layout, file, offset, bytes."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read everything and check every checksum. Exit code 3 if damaged, 5 if changed meanwhile, 6 if "
    "the system does not let it be read.",
)
@click.option(
    "--plan", is_flag=True, help="What this machine, or one described by the flags below, would do."
)
@click.option(
    "--env", is_flag=True, help="CPU, memory, native library, torch and CUDA; why something is off."
)
@click.option("--shape", help="Plan for a published shape instead of a bundle, e.g. qwen3-235b-a22b.")
@click.option(
    "--gpus", help="GPUs of the planned machine: 3x16GiB, 16GiB,24GiB or none.  [default: this machine's]"
)
@click.option("--gpu", help="GPUs of the planned machine by name: rtx4090x2, or h100,rtx3090.")
@click.option("--memory", help="RAM of the planned machine by its channels and kind: 8xDDR4-2666.")
@click.option(
    "--cpu-format",
    type=click.Choice(["q8", "int4"]),
    help="CPU experts of a model that is no bundle yet.  [default: what fits in RAM]",
)
@click.option(
    "--gpu-group",
    type=click.Choice(["32", "64", "128", "channel"]),
    help="Input features that share a scale in GPU experts of a model that is no bundle yet.",
)
@_rate("--pcie-gbps", "Pinned host-to-device rate of each GPU's link, GB/s.")
@_rate("--gpu-gbps", "VRAM bandwidth, GB/s.")
@_rate("--gpu-tflops", "Attainable bf16 matmul rate, TFLOP/s.")
@click.option("--ram", help="RAM, e.g. 1TiB.  [default: this machine's, or its cgroup's limit]")
@_rate("--ram-gbps", "Read bandwidth of RAM, GB/s.  [default: measured here]")
@click.option("--cpus", type=_AT_LEAST_1, help="CPU cores.  [default: those this process may use]")
@_rate("--cpu-gmacs", "int8 multiply-adds of all cores, 10^9/s.")
@_rate("--disk-gbps", "Sequential read rate of the disk, GB/s.")
@click.option("--context", type=_AT_LEAST_1, help="Positions of KV cache.  [default: the prompt + 2048]")
@click.option("--prompt-tokens", type=_AT_LEAST_1, help="Length of the prompt.  [default: 10000]")
@click.option(
    "--kv-dtype", type=click.Choice(["f16", "bf16", "f32", "int8"]), default="f16", show_default=True
)
@version_option()
@last_resort("krasis-info")
@ends_in_order("")
def main(**options: Any) -> None:
    """Show what is inside BUNDLE (a .krasis directory), what it needs, and whether it is intact.

    With --plan, BUNDLE may also be a model that is none yet: its name on the hub (org/model, of which only
    config.json is fetched), a config.json, the folder of a checkpoint, a GGUF.
    """
    try:
        sys.exit(_run(_Request(**options)))
    except KrasisError as error:
        _fail(error)
    except OSError as error:
        from krasis.formats.files.file_ops import refusal

        _fail(refusal(error))
    except KeyboardInterrupt:
        click.echo("krasis-info: stopped", err=True)
        sys.exit(INTERRUPTED)


def _fail(error: KrasisError) -> None:
    click.echo(f"krasis-info: {error}", err=True)
    sys.exit(error.exit_code)


def _run(request: _Request) -> int:
    _check(request)
    if not request.verify:  # whose verdict is its exit code
        check_stdout()
    record: dict[str, Any] = {"krasis_info": JSON_VERSION}
    texts: list[str] = []
    if request.env:
        _add_environment(record, texts)
    code = 0
    model = _planned(request)
    if model is not None:
        from krasis.runtime.cli.info_plan import add_plan

        add_plan(request, model, record, texts)
    elif request.bundle is not None:
        path = Path(request.bundle)
        if request.verify:
            code = _add_verification(path, record, texts)
        if not code:
            _add_bundle(request, path, record, texts)
    text = json.dumps(record, indent=1) if request.as_json else printable_lines("\n\n".join(texts))
    write_output(text + "\n")
    return code


def _check(request: _Request) -> None:
    if request.bundle is None and (request.verify or request.tensors):
        raise UsageError("a BUNDLE is needed for --verify and --tensors")
    if request.bundle is None and request.plan and request.shape is None:
        raise UsageError(
            "a BUNDLE or --shape is needed for --plan", hint="for example --shape qwen3-235b-a22b"
        )
    if request.gpu is not None and request.gpus is not None:
        raise UsageError("--gpu and --gpus both say what GPUs there are", hint="give one of them")
    if request.memory is not None and request.ram_gbps is not None:
        raise UsageError("--memory and --ram-gbps both say how fast RAM is", hint="give one of them")
    if request.bundle is None and not (request.env or request.plan):
        raise UsageError("nothing to show", hint="name a BUNDLE, or use --env, or --plan --shape NAME")
    if request.shape is not None and (request.bundle is not None or not request.plan):
        raise UsageError(
            "--shape stands in for a BUNDLE of --plan", hint="use --plan --shape NAME without a BUNDLE"
        )


def _planned(request: _Request) -> ModelSizes | PlannedModel | None:
    """What a plan is wanted of that is no bundle; None for a bundle, or for no plan."""
    if request.shape is not None:
        if request.cpu_format is None and request.gpu_group is None:
            return _sizes_of_shape(request)
        from krasis.runtime.cli.info_source import PlannedModel
        from krasis.runtime.planning.presets import shape

        return PlannedModel(shape(request.shape), request.shape)
    if not request.plan or request.bundle is None:
        return None
    from krasis.runtime.cli.info_source import planned_model

    model = planned_model(request.bundle)
    if model is None and (request.cpu_format or request.gpu_group):
        raise UsageError("--cpu-format and --gpu-group are for models that are no bundles yet")
    if model is not None and (request.verify or request.tensors):
        raise UsageError("a BUNDLE is needed for --verify and --tensors", got=request.bundle)
    return model


def _add_environment(record: dict[str, Any], texts: list[str]) -> None:
    from krasis.runtime.host.environment import probe_environment
    from krasis.runtime.host.environment_report import environment_to_json, environment_to_text

    found = probe_environment(with_torch=True)
    record["environment"] = environment_to_json(found)
    texts.append(environment_to_text(found))
    from krasis.runtime.cli.pinned_memory import pinned_memory_report

    record["pinned_memory"], text = pinned_memory_report(found)
    texts.append(text)


def _add_bundle(request: _Request, path: Path, record: dict[str, Any], texts: list[str]) -> None:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.cli import info
    from krasis.runtime.cli.info_text import text_to_json, text_to_text
    from krasis.runtime.planning.planner import make_workload
    from krasis.runtime.planning.sizes import sizes_of_bundle

    is_summary = not (request.tensors or request.verify or request.plan or request.env)
    with Bundle.open(path) as bundle:
        manifest: Manifest = bundle.manifest
        about_text = text_to_json(bundle) if is_summary else {}
    sizes = sizes_of_bundle(manifest)
    workload = make_workload(
        sizes.spec,
        context=request.context,
        prompt_tokens=request.prompt_tokens,
        kv_dtype=request.kv_dtype,
    )
    record["bundle"] = info.bundle_to_json(manifest, str(path), workload)
    if is_summary:
        record["text"] = about_text
        texts += [info.bundle_to_text(record["bundle"]), text_to_text(about_text)]
    if request.tensors:
        record["tensors"] = info.tensors_to_json(manifest)
        texts.append(info.tensors_to_text(record["tensors"]))
    if request.plan:
        shard = next((path / file.name for file in manifest.files if file.name.startswith("gpu-")), None)
        from krasis.runtime.cli.info_plan import add_plan

        add_plan(request, sizes, record, texts, shard)


def _add_verification(path: Path, record: dict[str, Any], texts: list[str]) -> int:
    """The exit code: 0 if the bundle is intact and its text files can be used, else that of the gravest
    problem's kind.
    """
    from krasis.formats.bundle.verify import EXIT_CODES, verdict
    from krasis.formats.units import format_bytes, format_seconds
    from krasis.runtime.cli import info

    num_bytes, seconds, problems = _verify_with_progress(path)
    lines = [info.problem_to_text(problem) for problem in problems]
    found = verdict(problems)
    record["verify"] = {
        "path": str(path),
        "intact": not problems,
        "verdict": found,
        "problems": lines,
        "num_bytes": num_bytes,
        "seconds": seconds,
    }
    text_is_unsound = False
    if not problems:
        from krasis.runtime.cli.info_text_check import add_text_check

        text_is_unsound = add_text_check(path, record["verify"], texts)
    if problems:
        texts.append("\n".join([f"{path}: {_HEADINGS[found]}, {len(lines)} problem(s)", *lines]))
    else:
        rate = num_bytes / max(seconds, 1e-9) / 1e9
        checked = f"{format_bytes(num_bytes)} checked in {format_seconds(seconds)} ({rate:.2f} GB/s)"
        texts.insert(0, f"{path}: intact, {checked}")
    return EXIT_CODES["damaged"] if text_is_unsound else EXIT_CODES[found]


def _verify_with_progress(path: Path) -> tuple[int, float, list[Problem]]:
    """(bytes checked, seconds, problems). The bar goes to stderr, and only if that is a terminal."""
    from tqdm import tqdm

    from krasis.formats.bundle.verify import verify_bundle

    done = 0
    lock = Lock()
    total = _bytes_to_verify(path)
    start = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None, leave=False) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            with lock:  # called from several threads
                done += num_bytes
                bar.update(num_bytes)

        problems = verify_bundle(path, advance)
    return done, time.perf_counter() - start, problems


def _bytes_to_verify(path: Path) -> int | None:
    """None for a bundle that cannot be opened: the verification says why."""
    from krasis.formats.bundle.reader import Bundle
    from krasis.formats.bundle.verify import verify_bytes

    try:
        with Bundle.open(path) as bundle:
            return verify_bytes(bundle)
    except KrasisError:
        return None


def _sizes_of_shape(request: _Request) -> ModelSizes:
    from krasis.runtime.planning.presets import shape
    from krasis.runtime.planning.sizes import sizes_of_shape

    return sizes_of_shape(shape(request.shape or ""))


if __name__ == "__main__":
    main()
