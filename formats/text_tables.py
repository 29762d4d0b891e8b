"""Plain text for people: tables, fields and paragraphs, with nothing of a file that a terminal would obey."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from krasis.formats.printable import printable


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
