"""Recognises the inputs by what they are: a Hugging Face checkpoint or a GGUF, in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import FormatError, UsageError

GGUF_MAGIC = b"GGUF"
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Inputs:
    """At least one of the two is set.

    ``hf`` is a folder or a .safetensors file, ``gguf`` a (first split) file.
    """

    hf: Path | None
    gguf: Path | None

    def paths(self) -> tuple[Path, ...]:
        """The inputs given, Hugging Face first."""
        return tuple(path for path in (self.hf, self.gguf) if path is not None)


def recognise(paths: Sequence[Path]) -> Inputs:
    """Sorts one or two inputs into kinds.

    Raises UsageError for none, three, or two of a kind, FormatError for others.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(
            "one or two inputs are needed: a BF16 folder, a GGUF, or both",
            got=f"{len(paths)} inputs",
            hint="krasis-convert bf16/ model-q8_0.gguf -o model.krasis",
        )
    found: dict[str, Path] = {}
    for path in paths:
        kind, resolved = _recognise_one(path)
        if kind in found:
            raise UsageError(
                f"both inputs are {'GGUF files' if kind == 'gguf' else 'Hugging Face checkpoints'}",
                got=f"{found[kind]} and {path}",
                hint="give one of each kind, or only one input"
                + ("; name only the first file of a split GGUF" if kind == "gguf" else ""),
            )
        found[kind] = resolved
    return Inputs(hf=found.get("hf"), gguf=found.get("gguf"))


def _recognise_one(path: Path) -> tuple[str, Path]:
    if not path.exists():
        raise UsageError("no such file or folder", where=str(path))
    if path.is_dir():
        return _recognise_folder(path)
    if not path.is_file():
        raise FormatError("neither a regular file nor a folder", where=str(path))
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if head.startswith(GGUF_MAGIC):
        return "gguf", _first_split(path)
    # A safetensors file begins with its header's length (u64) and the header's brace.
    if len(head) == 9 and head[8:9] == b"{":
        if not (path.parent / "config.json").is_file():
            raise UsageError("there is no config.json beside this safetensors file", where=str(path))
        return "hf", path
    if path.name.endswith(".index.json") or path.name == "config.json":
        return _recognise_folder(path.parent)
    raise FormatError(
        "neither a GGUF nor a safetensors file",
        where=str(path),
        got=f"first bytes {head[:8].hex() or 'none'}",
        hint="give a Hugging Face folder (config.json and *.safetensors) or a .gguf file",
    )


def _recognise_folder(path: Path) -> tuple[str, Path]:
    if (path / "manifest.json").is_file():
        raise UsageError(
            "this is a Krasis bundle already", where=str(path), hint="krasis-run takes it as it is"
        )
    has_weights = any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file()
    if (path / "config.json").is_file() and has_weights:
        return "hf", path
    ggufs = sorted(path.glob("*.gguf"))
    firsts = [gguf for gguf in ggufs if not _later_split(gguf)]
    if len(firsts) == 1:
        return "gguf", firsts[0]
    if len(firsts) > 1:
        names = ", ".join(gguf.name for gguf in firsts[:4])
        raise UsageError("this folder holds several GGUF models", where=str(path), got=names, hint="name one")
    missing = "safetensors files" if (path / "config.json").is_file() else "config.json"
    raise FormatError(
        f"this folder is no model: it has no {missing}",
        where=str(path),
        hint="give the folder of the checkpoint",
    )


def _later_split(path: Path) -> bool:
    match = _SPLIT_NAME.search(path.name)
    return match is not None and int(match.group(1)) != 1


def _first_split(path: Path) -> Path:
    """The first file of a split GGUF, whichever of its files was named."""
    match = _SPLIT_NAME.search(path.name)
    if match is None or int(match.group(1)) == 1:
        return path
    return path.with_name(f"{path.name[: match.start()]}-00001-of-{match.group(2)}.gguf")
