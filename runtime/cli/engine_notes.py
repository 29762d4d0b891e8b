"""What a user is told of an engine besides what it answers."""

from __future__ import annotations

from typing import Any

import click

from krasis.runtime.cli.output import note
from krasis.runtime.engine import Engine
from krasis.runtime.host.visible_gpus import idle_options_note


def tell_idle_options(engine: Engine, options: dict[str, Any]) -> None:
    """A note if options for GPUs were given and none is used."""
    if not engine.description.startswith(("CPU", "NumPy")):
        return
    given = [flag for flag, name in (("--gpus", "gpus"), ("--vram", "vram")) if options[name] is not None]
    if idle := idle_options_note(given, options["device"]):
        click.echo(f"note: {idle}", err=True)


def tell_changes(engine: Engine) -> None:
    """A note if files of the bundle were written to meanwhile."""
    if changed := engine.bundle.changed_files():
        where = ", ".join(str(engine.bundle.path / name) for name in changed)
        note(
            f"{where}: written to while the model ran: what it said may be wrong. krasis-info --verify checks"
        )
