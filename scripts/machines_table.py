"""Writes docs/MACHINES.md, and its short form in the README: what the planner expects of machine and model.

    python -m scripts.machines_table

Every figure is krasis-info's: ``krasis-info --plan --shape MODEL --gpu ... --memory ... --ram ...``. Run it
again after a change of the planner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from krasis.runtime.cli.info_command import main as krasis_info

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- machines: begin -->", "<!-- machines: end -->"
PROMPT = 10_000


@dataclass(frozen=True, slots=True)
class Machine:
    """name: for readers. gpus: choices of ``--gpu``, or of ``--gpus`` with none. flags: the rest."""

    name: str
    gpus: tuple[str, ...]
    memory: str
    ram: str
    cpus: int

    def arguments(self, gpu: str) -> list[str]:
        """Of krasis-info, without the model."""
        cards = ["--gpus", "none"] if gpu == "none" else ["--gpu", gpu]
        return [*cards, "--memory", self.memory, "--ram", self.ram, "--cpus", str(self.cpus)]


MACHINES = (
    Machine(
        "EPYC 7742, 8 x DDR4-2666", ("none", *(f"rtxa4000x{n}" for n in (1, 2, 3))), "8xDDR4-2666", "1TiB", 64
    ),
    Machine("Threadripper, 8 x DDR5-4800", ("rtx4090",), "8xDDR5-4800", "256GiB", 32),
    Machine("EPYC, 12 x DDR5-4800", ("none", "rtx4090"), "12xDDR5-4800", "768GiB", 96),
    Machine("desktop, 2 x DDR5-5600", ("none", "rtx3090"), "2xDDR5-5600", "192GiB", 16),
)
MODELS = (
    "qwen3-30b-a3b",
    "qwen3.5-35b-a3b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "glm-4.5-air",
    "qwen3-235b-a22b",
    "qwen3.5-397b-a17b",
    "deepseek-v3",
)
IN_README = (
    ("EPYC 7742, 8 x DDR4-2666", "rtxa4000x1", "qwen3-235b-a22b"),
    ("EPYC 7742, 8 x DDR4-2666", "rtxa4000x3", "qwen3-235b-a22b"),
    ("EPYC, 12 x DDR5-4800", "rtx4090", "qwen3-235b-a22b"),
    ("Threadripper, 8 x DDR5-4800", "rtx4090", "qwen3-235b-a22b"),
    ("desktop, 2 x DDR5-5600", "rtx3090", "glm-4.5-air"),
    ("desktop, 2 x DDR5-5600", "rtx3090", "qwen3-30b-a3b"),
)
HEAD = """\
| machine | GPU | model | CPU experts | prefill tok/s | decode tok/s |
| --- | --- | --- | --- | ---: | ---: |"""


def row(machine: Machine, gpu: str, model: str) -> str:
    """A line of the table: the planner's figures, or its own words where it says no."""
    names = f"{machine.name}, {machine.ram} | {'none' if gpu == 'none' else gpu} | {model}"
    arguments = [
        "--plan",
        "--json",
        "--shape",
        model,
        "--prompt-tokens",
        str(PROMPT),
        *machine.arguments(gpu),
    ]
    done = CliRunner().invoke(krasis_info, arguments)
    if done.exit_code:
        words = done.stderr.strip().splitlines()[0] if done.stderr else str(done.exception)
        return f"| {names} | - | {words.removeprefix('krasis-info: ').partition(' (')[0]} | - |"
    plan: dict[str, Any] = json.loads(done.stdout)["plan"]
    kind = {"cpu-q8": "8 bits", "cpu-i4": "4 bits", "cpu-mx": "MXFP4"}[plan["sizes"]["cpu_layout"][:6]]
    slow = " (read from disk)" if plan["host"]["from_disk_bytes"] else ""
    cells = [_range(plan, f"{part}_tokens_per_s") for part in ("prefill", "decode")]
    return f"| {names} | {kind}{slow} | {cells[0]} | {cells[1]} |"


def _range(plan: dict[str, Any], name: str) -> str:
    part = plan[name.partition("_")[0]]
    low, high = plan["ranges"][name] or (part["tokens_per_s"],) * 2
    digits = 0 if high >= 20 else 1
    return f"{low:.{digits}f}-{high:.{digits}f}"


def rows() -> Iterator[str]:
    """All of them, by machine, then GPUs, then model."""
    for machine in MACHINES:
        for gpu in machine.gpus:
            for model in MODELS:
                yield row(machine, gpu, model)


def short(lines: Sequence[str]) -> str:
    """The README's rows."""
    chosen = [
        next(line for line in lines if line.startswith(f"| {name}") and f"| {gpu} | {model} |" in line)
        for name, gpu, model in IN_README
    ]
    return "\n".join((BEGIN, HEAD, *chosen, END))


def document(lines: Sequence[str]) -> str:
    """docs/MACHINES.md."""
    return f"""\
# Your machine, your model

<!-- Written by scripts/machines_table.py from the planner; do not edit. -->

What `krasis-info --plan` expects of a prompt of {PROMPT:,} tokens and the tokens after it, from rates that
are assumed from the parts' names (ranges: 25 % lower to 10 % higher). GPUs: NVIDIA RTX A4000 (16 GB), RTX
3090 and 4090 (24 GB), as `--gpu` knows them. Experts are kept in 8 bits where the RAM has room for them, else
in 4. For your own machine and model:

    krasis-info --plan org/model --gpu rtx4090x2 --memory 8xDDR5-4800 --ram 256GiB --cpus 32

{HEAD}
{chr(10).join(lines)}
"""


def in_readme(text: str, table: str) -> str:
    """The README with another table. Raises ClickException where its marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise click.ClickException(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{table}{after}"


@click.command(help=__doc__)
def main() -> None:
    """Both documents."""
    lines = list(rows())
    (ROOT / "docs" / "MACHINES.md").write_text(document(lines), "utf-8")
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text("utf-8"), short(lines)), "utf-8")
    click.echo(f"docs/MACHINES.md: {len(lines)} rows")


if __name__ == "__main__":
    main()
