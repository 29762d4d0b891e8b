"""What all commands have in common: streams of any state, how errors end them, and --version."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from krasis.formats.errors import KrasisError
from krasis.formats.process.standard_streams import finish_output, output_error, prepare_streams
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
            if failed is None and isinstance(ending, OSError):
                # A text longer than the stream's buffer is lost when it is refused: nothing is left to fail
                # again. Errors of the command's own work do not come here, but click's printing does.
                failed = output_error(ending)
            if failed is None or (isinstance(ending, SystemExit) and ending.code not in (0, None)):
                raise
            click.echo(f"{extra.get('prog_name') or Path(sys.argv[0]).name}: {failed}", err=True)
            sys.exit(failed.exit_code)


class CommandError(click.ClickException):
    """A KrasisError on its way out of a program: one line on stderr and the class's exit code."""

    def __init__(self, program: str, error: KrasisError) -> None:
        super().__init__(" ".join(str(error).split()))
        self.program = program
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares it a constant of the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the line."""
        click.echo(f"{self.program}: {self.message}", file=file or sys.stderr)


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
