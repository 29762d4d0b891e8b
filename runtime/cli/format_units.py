"""Numbers for people: counts, rates and plain text tables beside the sizes and times of ``formats.units``;
and lists of GPUs for command line flags.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from krasis.formats.errors import UsageError
from krasis.formats.printable import printable
from krasis.formats.units import format_bytes as format_bytes
from krasis.formats.units import format_seconds as format_seconds
from krasis.formats.units import parse_bytes as parse_bytes
from krasis.formats.units import scaled

_GPU_GROUP = re.compile(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", re.ASCII)
MAX_GPUS = 1024


def format_binary(num_bytes: int) -> str:
    """``16 GiB`` where that is exact to two decimals, as memory is sold; else the decimal form."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return format_bytes(num_bytes)


def format_count(count: float) -> str:
    """``235.1 B``: thousands, millions, billions, trillions."""
    return scaled(count, ("", "K", "M", "B", "T")).rstrip()


def format_rate(per_second: float) -> str:
    """Tokens a second with three significant digits."""
    if per_second >= 100 or per_second == 0:
        return f"{per_second:.0f} tok/s"
    return f"{per_second:.{max(0, 2 - math.floor(math.log10(per_second)))}f} tok/s"


def parse_gpus(text: str, where: str = "--gpus") -> tuple[int, ...]:
    """VRAM bytes of each GPU: ``3x16GiB``, ``16GiB,24GiB``, ``none``. Raises UsageError."""
    if text.strip().lower() in ("none", "0"):
        return ()
    sizes: list[int] = []
    for part in text.split(","):
        match = _GPU_GROUP.fullmatch(part.strip())
        if match is None:
            raise UsageError("not a list of GPUs", where=where, got=repr(text), hint="write it like 3x16GiB")
        count = int(match.group(1) or 1)
        if not 1 <= count + len(sizes) <= MAX_GPUS or count == 0:
            raise UsageError(
                "number of GPUs is out of range", where=where, got=repr(text), limit=f"1 to {MAX_GPUS}"
            )
        sizes.extend([parse_bytes(match.group(2), where)] * count)
    return tuple(sizes)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligned columns under a header, two spaces apart. ``right``: one ``l`` or ``r`` for each column."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    sides = right.ljust(len(header), "l")
    out = []
    for index, line in enumerate(lines):
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ]
        out.append("  ".join(cells).rstrip())
        if index == 0:
            out.append("  ".join("-" * width for width in widths))
    return "\n".join(out)


def text_fields(pairs: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """``name   value`` lines with the values aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    lines = (f"{' ' * indent}{printable(name).ljust(width)}  {printable(value)}" for name, value in pairs)
    return "\n".join(line.rstrip() for line in lines)


def text_paragraphs(sentences: Iterable[str], width: int = 108) -> str:
    """``  - sentence`` for each, wrapped (but no word or path is broken)."""
    wrapped = (
        textwrap.fill(
            sentence,
            width,
            initial_indent="  - ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for sentence in sentences
    )
    return "\n".join(wrapped)
