#!/usr/bin/env python3
"""Where the time of a start goes: from the command to the first token of a bundle, in one table.

Runs ``krasis-run -vv`` and reads the stages that it tells (``formats/process/stages.py``), of all ranks. A
stage named "(behind) ..." goes on beside the others. One that happens often is one line: its first
beginning, the sum of its seconds, and how often. Example:

    python -m scripts.profile_start model.krasis --device cuda --tokens 10000 --repeat 3
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from krasis.formats.process.stages import Stage, read_stage
from krasis.formats.text_tables import text_table

COMMAND = (
    sys.executable,
    "-c",
    "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')",
)
WORD = "word "  # of a text of about so many tokens


@dataclass(frozen=True, slots=True)
class Row:
    """A stage of one rank. begin_s: after the command began. count: how often it happened."""

    rank: int
    name: str
    begin_s: float
    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start. first_token_s: from the command to the first byte of the answer; total_s: to its end."""

    rows: tuple[Row, ...]
    first_token_s: float
    total_s: float
    log: str

    def to_json(self) -> dict[str, object]:
        """Without the log."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
        }


def rows_of(stages: Iterable[Stage], begin_s: float) -> tuple[Row, ...]:
    """One row a rank and name, by their beginnings."""
    found: dict[tuple[int, str], Row] = {}
    for one in stages:
        old = found.get((one.rank, one.name))
        first_s = one.begin_s - begin_s
        if old is None:
            found[one.rank, one.name] = Row(one.rank, one.name, first_s, one.seconds, 1)
        else:
            begin = min(old.begin_s, first_s)
            found[one.rank, one.name] = Row(
                one.rank, one.name, begin, old.seconds + one.seconds, old.count + 1
            )
    return tuple(sorted(found.values(), key=lambda row: (row.begin_s, -row.seconds)))


def run_once(bundle: Path, options: tuple[str, ...], prompt: str) -> Start:
    """Starts the command and waits for its end. Raises ClickException with its log if it fails."""
    with tempfile.TemporaryFile("w+") as log, tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(prompt)
        text.flush()
        arguments = (str(bundle), "-vv", "--raw", "--file", text.name, "--max-tokens", "2", *options)
        begin_s = time.monotonic()
        process = subprocess.Popen(  # our own interpreter and module
            (*COMMAND, *arguments), stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
        )
        with process:
            if process.stdout is None:
                raise click.ClickException("the command has no output")
            os.read(process.stdout.fileno(), 1)
            first_token_s = time.monotonic() - begin_s
            process.stdout.read()
            code = process.wait()
        total_s = time.monotonic() - begin_s
        log.seek(0)
        lines = log.read()
    if code:
        raise click.ClickException(f"krasis-run ended with {code}:\n{lines[-4000:]}")
    stages = [found for line in lines.splitlines() if (found := read_stage(line)) is not None]
    return Start(rows_of(stages, begin_s), first_token_s, total_s, lines)


def shown(start: Start) -> str:
    """The table."""
    rows = [
        (
            str(row.rank),
            f"{row.begin_s:.3f}",
            f"{row.seconds:.3f}",
            str(row.count) if row.count > 1 else "",
            row.name,
        )
        for row in start.rows
    ]
    last = f"first token after {start.first_token_s:.3f} s, end after {start.total_s:.3f} s"
    header = ("rank", "begin s", "seconds", "times", "stage")
    return f"{text_table(header, rows, 'rrrrl')}\n{last}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="auto", show_default=True, help="As of krasis-run.")
@click.option("--tokens", default=16, show_default=True, help="About so many tokens of prompt.")
@click.option("--repeat", default=1, show_default=True, help="Starts, one after the other.")
@click.option("--log", type=click.Path(path_type=Path), help="Keep the last start's log there.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write all starts there.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    bundle: Path,
    device: str,
    tokens: int,
    repeat: int,
    log: Path | None,
    as_json: Path | None,
    options: tuple[str, ...],
) -> None:
    """Start BUNDLE and tell where the time goes. OPTIONS behind -- are krasis-run's."""
    starts = []
    for _ in range(repeat):
        start = run_once(bundle, ("--device", device, *options), WORD * tokens)
        starts.append(start)
        click.echo(shown(start))
        if log is not None:
            log.write_text(start.log)
        if as_json is not None:
            as_json.write_text(json.dumps([one.to_json() for one in starts], indent=1))


if __name__ == "__main__":
    main()
