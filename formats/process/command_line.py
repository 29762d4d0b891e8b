"""What all commands have in common: streams of any state, and --version."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from krasis.formats.process.standard_streams import finish_output, prepare_streams
from krasis.formats.process.tool import tool_version

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class StreamsCommand(click.Command):
    """A command that ends with a sentence and an exit code of its own where stdout is full or its reader has
    left, also while it prints its help.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command as click does, with the standard streams prepared."""
        prepare_streams()
        try:
            return super().main(*args, **extra)
        except (OSError, SystemExit) as ending:
            failed = finish_output()
            if failed is None or (isinstance(ending, SystemExit) and ending.code not in (0, None)):
                raise
            click.echo(f"{extra.get('prog_name') or Path(sys.argv[0]).name}: {failed}", err=True)
            sys.exit(failed.exit_code)


def version_option() -> Callable[[_Decorated], _Decorated]:
    """--version: the distribution's."""

    def show(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted and not context.resilient_parsing:
            click.echo(f"{context.find_root().info_name}, version {tool_version()}")
            context.exit()

    return click.option(
        "--version",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version and leave.",
    )
