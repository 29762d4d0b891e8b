"""Numbers for people: bytes, counts, seconds and plain text tables; and back again for command line flags.

Sizes are printed in decimal units (1 GB = 10^9 bytes), as disks and links count. Flags accept both:
``16GB`` is 16 * 10^9 bytes and ``16GiB`` is 16 * 2^30.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from krasis.formats.errors import UsageError

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_UNIT_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base ** (power + 1)
    for power, prefix in enumerate("kmgtp")
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_MAX_BYTES = 2**60
_GPU_GROUP = re.compile(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", re.ASCII)
MAX_GPUS = 1024


def format_bytes(num_bytes: float) -> str:
    """``117.1 GB``. At least three significant digits; exact below 1 kB."""
    return _scaled(num_bytes, _DECIMAL)


def format_binary(num_bytes: int) -> str:
    """``16 GiB`` where that is exact to two decimals, as memory is sold; else the decimal form."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return format_bytes(num_bytes)


def format_count(count: float) -> str:
    """``235.1 B``: thousands, millions, billions, trillions."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while power + 1 < len(units) and abs(value) >= 999.5 * 1000**power:
        power += 1
    if power == 0:
        return f"{value:.0f} {units[0]}"
    scaled = value / 1000**power
    return f"{scaled:.{1 if scaled >= 9.995 else 2}f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """``8.2 us``, ``31 ms``, ``9.01 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 119.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_rate(per_second: float) -> str:
    """Tokens a second with three significant digits."""
    if per_second >= 100 or per_second == 0:
        return f"{per_second:.0f} tok/s"
    return f"{per_second:.{max(0, 2 - math.floor(math.log10(per_second)))}f} tok/s"


def parse_bytes(text: str, where: str = "size") -> int:
    """Bytes of ``16GiB``, ``1.5TB``, ``4096``. Raises UsageError for anything else and beyond 2^60."""
    match = _SIZE.fullmatch(text)
    unit = _UNIT_BYTES.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError("not a size", where=where, got=repr(text), hint="write it like 16GiB, 141GB or 1TiB")
    num_bytes = float(match.group(1)) * unit
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise UsageError("size is out of range", where=where, got=repr(text), limit="1 byte to 2^60 bytes")
    return int(num_bytes)


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


def printable(text: str) -> str:
    """Text of a file without what would steer a terminal: control characters and escape sequences."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


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
