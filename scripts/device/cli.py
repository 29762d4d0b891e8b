"""One command: runs the stages that are not done yet, then writes one JSON file and one table of all that is
known.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import click

from scripts.device import report, runner
from scripts.device.context import REPOSITORY, SIZES, Context
from scripts.device.stages import STAGES
from scripts.device.state import Entry, State, source_digest

PATH = click.Path(path_type=Path)
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "krasis-device"


def chosen_stages(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """A click callback: names of stages, or ``all``."""
    names = (
        tuple(STAGES) if value == "all" else tuple(part.strip() for part in value.split(",") if part.strip())
    )
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise click.BadParameter(f"{', '.join(unknown) or 'nothing'}: there are {', '.join(STAGES)}")
    return names


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Stages: " + "; ".join(f"{stage.name}: {stage.help}" for stage in STAGES.values()),
)
@click.option("--stage", "stages", default="all", callback=chosen_stages, help="Names with commas, or all.")
@click.option(
    "--dir", "folder", type=PATH, envvar="KRASIS_DEVICE_DIR", default=DEFAULT_FOLDER, show_default=True,
    help="Where everything is built and kept ($KRASIS_DEVICE_DIR).",
)  # fmt: skip
@click.option("--out", type=PATH, envvar="OUT", help="Copy the reports there too ($OUT).")
@click.option("--merge", type=PATH, multiple=True, help="Take over the stages of another run's results.json.")
@click.option("--again", is_flag=True, help="Run the named stages although they are done.")
@click.option(
    "--device",
    type=click.Choice(["cuda", "double"]),
    default="cuda",
    help="double: a test on the CPU.",
)
@click.option("--size", type=click.Choice(sorted(SIZES)), default="real", help="tiny: to test this.")
@click.option("--wheels", type=PATH, default=REPOSITORY / ".whl", help="Folder of wheels this machine lacks.")
@click.option(
    "--ram", "ram_gb", type=float, help="GB that bundles in RAM may take. [default: by what is available]"
)
@click.option("--child", hidden=True, help="Run one stage in this process.")
def main(
    stages: tuple[str, ...],
    folder: Path,
    out: Path | None,
    merge: tuple[Path, ...],
    again: bool,
    device: str,
    size: str,
    wheels: Path,
    ram_gb: float | None,
    child: str | None,
) -> None:
    """Build Krasis on a machine with an NVIDIA GPU, check it there, and measure it."""
    context = Context(
        folder.absolute(), device, size, wheels.absolute(), int(ram_gb * 1e9) if ram_gb is not None else None
    )
    if child is not None:
        runner.run_here(context, child)
        return
    state = State(folder / "results.json")
    for path in merge:
        state.merge(path)
    state.save()
    failed = [name for name in stages if not run_stage(context, state, name, again)]
    text = report.to_markdown(state)
    (folder / "results.md").write_text(text, "utf-8")
    for name in ("results.json", "results.md", "logs"):
        copy(folder / name, out)
    click.echo(text)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; see {folder / 'logs'}")


def run_stage(context: Context, state: State, name: str, again: bool) -> bool:
    """Whether the stage is done now, or need not be. Tells what happens."""
    stage = STAGES[name]
    digest = source_digest(stage.sources, context)
    if not again and state.is_done(name, digest):
        click.echo(f"== {name}: done before with the same sources")
        return True
    click.echo(f"== {name}: {stage.help}")
    entry: Entry = runner.run_stage(context, stage, digest)
    state.put(entry)
    tail = entry.error or json.dumps(entry.result)[:200]
    click.echo(f"== {name}: {entry.status} in {entry.seconds:.0f} s: {tail}")
    return entry.status != "failed"


def copy(path: Path, out: Path | None) -> None:
    """A file or a folder into another folder, if there is one."""
    if out is None or not path.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, out / path.name, dirs_exist_ok=True)
    elif os.path.realpath(path) != os.path.realpath(out / path.name):
        shutil.copyfile(path, out / path.name)
