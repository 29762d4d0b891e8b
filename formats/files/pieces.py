"""Files that were cut into raw pieces to be joined by ``cat``: ``model.gguf.part1of2``,
``model.gguf-split-a``, ``model.gguf.001``. They are not the parts of gguf-split, each of which is a GGUF
file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import FormatError
from krasis.formats.files.regular_file import list_names
from krasis.formats.names import shown

_NAME = re.compile(
    r"(?P<whole>.+\.(?:gguf|safetensors))[._-]+"
    r"(?:(?P<mark>part|split|chunk|piece)[._-]?)?"
    r"(?:(?P<number>\d{1,4})(?:[._-]?of[._-]?(?P<count>\d{1,4}))?|(?P<letters>(?(mark)[a-z]{1,3}|[a-c]?[a-z])))",
    re.IGNORECASE,
)
_MOST_SHOWN = 6


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A name taken apart. whole: the file it is a piece of; number: its place, by letters from 0; count: of
    all pieces, 0 if the name does not say; is_sure: whether the name alone says that it is a piece.
    """

    name: str
    whole: str
    number: int
    by_letters: bool
    count: int
    is_sure: bool


def piece_of(name: str) -> FilePiece | None:
    """The piece that a name speaks of; None for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    letters, count = (match["letters"] or "").lower(), int(match["count"] or 0)
    number = int(match["number"] or 0)
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a")
    is_sure = match["mark"] is not None or count > 0
    return FilePiece(name, match["whole"], number, bool(letters), count, is_sure)


def pieces_among(names: Iterable[str]) -> dict[str, list[FilePiece]]:
    """The pieces among names by the file they make, in their order. What only looks like one, without another
    beside it, is none.
    """
    found: dict[str, list[FilePiece]] = {}
    for piece in map(piece_of, names):
        if piece is not None:
            found.setdefault(piece.whole, []).append(piece)
    return {
        whole: sorted(pieces, key=lambda piece: (piece.number, piece.name))
        for whole, pieces in found.items()
        if any(piece.is_sure for piece in pieces) or len(pieces) > 1
    }


def refuse_piece(path: Path) -> None:
    """Raises FormatError if a file is a raw piece of another, by its name and those beside it."""
    piece = piece_of(path.name)
    if piece is None:
        return
    pieces = pieces_among(list_names(path.parent)).get(piece.whole, [])
    if piece in pieces:
        raise pieces_error(path.parent, pieces)


def pieces_error(folder: Path, pieces: Sequence[FilePiece]) -> FormatError:
    """The sentence about the pieces of one file: how to join them, or which are missing."""
    whole, names = pieces[0].whole, [piece.name for piece in pieces]
    if missing := _missing(pieces):
        return FormatError(
            f"{shown(whole)} was cut into raw pieces, to be joined by cat, and {missing} missing",
            where=str(folder),
            got=", ".join(names[:_MOST_SHOWN]),
            hint="download all of them, then join them in order with cat",
        )
    quoted = [shlex.quote(name) for name in names]
    words = " ".join(quoted) if len(quoted) <= _MOST_SHOWN else f"{quoted[0]} ... {quoted[-1]}"
    return FormatError(
        f"{shown(whole)} was cut into {len(names)} raw pieces, which are no files of their own",
        where=str(folder),
        hint=f"join them in this folder and give the result: cat {words} > {shlex.quote(whole)}",
    )


def _missing(pieces: Sequence[FilePiece]) -> str:
    """``piece 2 of 3 is`` or ``pieces 2, 3 are``: what a complete set has beside these, as names tell."""
    found = {piece.number for piece in pieces}
    count = max(piece.count for piece in pieces)
    first = 0 if pieces[0].by_letters or 0 in found else 1
    absent = [str(number) for number in range(first, (count or max(found)) + 1) if number not in found]
    if not absent:
        return "others are" if len(pieces) == 1 and count != 1 else ""
    more = ", ..." if len(absent) > _MOST_SHOWN else ""
    total = f" of {count}" if count else ""
    named = ", ".join(absent[:_MOST_SHOWN])
    return f"pieces {named}{more}{total} are" if len(absent) > 1 else f"piece {named}{total} is"
