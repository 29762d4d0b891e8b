"""Sizes, counts, rates and times for people, and sizes from people: one grammar for every option of every
command.

Sizes are printed in decimal units (1 GB = 10^9 bytes), as disks and links count. Read are ``14GiB``,
``14 GB``, ``1.5T``, ``512m``, ``4096``: with ``i`` or without ``B`` a unit is binary, as memory is sold; with
``B`` alone it is decimal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from krasis.formats.errors import UsageError

DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MAX_BYTES = 2**60
_SIZE = re.compile(
    r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*(?:([kmgtp]?)(i?)(b?)|bytes?)\s*", re.ASCII | re.IGNORECASE
)
_PREFIXES = "kmgtp"
_GPU_GROUP = re.compile(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", re.ASCII)
MAX_GPUS = 1024
_EXAMPLES = "write it like 16GiB, 141GB, 512M or a number of bytes"


def parse_bytes(text: str, where: str = "size") -> int:
    """Bytes of ``16GiB``, ``1.5TB``, ``512m``, ``4096``; where: the option. Raises UsageError for anything
    else, for less than 1 byte and beyond 2^60.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match.group(3) and not match.group(2)):
        raise UsageError("not a size", where=where, got=repr(text[:80]), hint=_EXAMPLES)
    from fractions import Fraction  # 2 ms, which commands without such an option do without

    number, prefix, infix, suffix = match.groups()
    base = 1000 if suffix and not infix else 1024
    power = _PREFIXES.index(prefix.lower()) + 1 if prefix else 0
    num_bytes = Fraction(number) * base**power
    if not 1 <= num_bytes <= MAX_BYTES:
        raise UsageError(
            "size is out of range", where=where, got=repr(text[:80]), limit="1 byte to 2^60 bytes"
        )
    return int(num_bytes)


def format_bytes(num_bytes: float) -> str:
    """``117.1 GB``. At least three significant digits; exact below 1 kB."""
    return scaled(num_bytes, DECIMAL_UNITS)


def scaled(value: float, units: Sequence[str]) -> str:
    """A number in the largest of some units, each a thousand of the one before, that leaves at least 1."""
    power = 0
    while power + 1 < len(units) and abs(value) >= 999.5 * 1000**power:
        power += 1
    if power == 0:
        return f"{value:.0f} {units[0]}"
    number = value / 1000**power
    return f"{number:.{1 if number >= 9.995 else 2}f} {units[power]}"


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
