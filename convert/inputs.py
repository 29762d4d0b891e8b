"""Recognises the inputs by what they are: a Hugging Face checkpoint or a GGUF, in any order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from krasis.convert.model_folder import missing_path_hint, recognise_folder
from krasis.formats.bundle.manifest import MANIFEST_NAME
from krasis.formats.checkpoints.shard_index import INDEX_SUFFIX
from krasis.formats.errors import FormatError, UsageError
from krasis.formats.files.file_kinds import AGAIN, kind_of_bytes, read_head
from krasis.formats.files.pieces import refuse_piece
from krasis.formats.files.regular_file import open_regular

GGUF_MAGIC = b"GGUF"
_SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.(gguf|safetensors)$")
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Inputs:
    """At least one of the two is set.

    ``hf`` is a folder, an index or a .safetensors file, ``gguf`` a (first split) file. notes: what was taken
    for what was given, a sentence each.
    """

    hf: Path | None
    gguf: Path | None
    notes: tuple[str, ...] = ()

    def paths(self) -> tuple[Path, ...]:
        """The inputs given, Hugging Face first."""
        return tuple(path for path in (self.hf, self.gguf) if path is not None)


def recognise(paths: Sequence[Path]) -> Inputs:
    """Sorts one or two inputs into kinds.

    Raises UsageError for none, three, or two of a kind, FormatError for others.
    """
    for path in paths:
        if path.is_file():
            refuse_piece(path)
    paths = _merged(paths)
    if not 1 <= len(paths) <= 2:
        raise UsageError(
            "one or two inputs are needed: a BF16 folder, a GGUF, or both",
            got=f"{len(paths)} inputs",
            hint="krasis-convert bf16/ model-q8_0.gguf -o model.krasis",
        )
    found: dict[str, Path] = {}
    notes: list[str] = []
    for path in paths:
        kind, resolved, more = _recognise_one(path)
        notes += more
        if kind in found:
            raise UsageError(
                f"both inputs are {'GGUF files' if kind == 'gguf' else 'Hugging Face checkpoints'}",
                got=f"{found[kind]} and {path}",
                hint="give one of each kind, or only one input"
                + ("; name only the first file of a split GGUF" if kind == "gguf" else ""),
            )
        found[kind] = resolved
    return Inputs(hf=found.get("hf"), gguf=found.get("gguf"), notes=tuple(notes))


def _recognise_one(path: Path) -> tuple[str, Path, tuple[str, ...]]:
    if not path.exists():
        hint = "it is a link that leads nowhere" if path.is_symlink() else missing_path_hint(path)
        raise UsageError("no such file or folder", where=str(path), hint=hint)
    if path.is_dir():
        return recognise_folder(path)
    if not path.is_file():
        raise FormatError("neither a regular file nor a folder", where=str(path))
    if path.name.endswith(INDEX_SUFFIX):
        return "hf", path, ()
    if path.name == "config.json":
        return recognise_folder(path.parent)
    if path.name == MANIFEST_NAME:
        raise UsageError(
            "this is a Krasis bundle already", where=str(path.parent), hint="krasis-run takes it"
        )
    fd = open_regular(path, follow_links=True)
    try:
        head = read_head(fd, str(path))
    finally:
        os.close(fd)
    if head.startswith(GGUF_MAGIC):
        return "gguf", _first_split(path), ()
    # A safetensors file begins with its header's length (u64) and the header's brace.
    if head[8:9] == b"{":
        if (path.parent / MANIFEST_NAME).is_file():
            raise UsageError(
                "this is a file of a Krasis bundle", where=str(path), hint="krasis-run takes the folder"
            )
        if not (path.parent / "config.json").is_file():
            raise UsageError(
                "there is no config.json beside this safetensors file",
                where=str(path),
                hint="get the checkpoint's config.json and tokenizer files too",
            )
        return "hf", path, ()
    if head:
        kind = kind_of_bytes(head)
        got = f"first bytes {head[:8].hex()}" if kind is None else None
        raise FormatError(
            "neither a GGUF nor a safetensors file" + (f": this is {kind.what}" if kind else ""),
            where=str(path),
            got=got,
            hint=kind.hint
            if kind
            else "give a Hugging Face folder (config.json and *.safetensors) or a .gguf file",
        )
    raise FormatError("the file is empty: the download failed", where=str(path), hint=AGAIN)


def _merged(paths: Sequence[Path]) -> list[Path]:
    """The inputs, parts of one model as one."""
    found: list[Path] = []
    for path in paths:
        whole = _whole(path)
        if whole == path and _SHARD_NAME.search(path.name) is None:
            found.append(path)  # named twice, it is told
        elif whole not in found:
            found.append(whole)
    return found


def _whole(path: Path) -> Path:
    """What a file is one of several parts of: the first file of a split GGUF, the folder of a checkpoint's
    shards; else the path itself. So a shell's ``*`` and any one of the parts name the model.
    """
    match = _SHARD_NAME.search(path.name)
    if match is None or int(match.group(2)) == 1 or not path.is_file():
        return path
    if match.group(3) == "gguf":
        first = _first_split(path)
        return first if first.exists() else path
    return path.parent if (path.parent / "config.json").is_file() else path


def _first_split(path: Path) -> Path:
    """The first file of a split GGUF, whichever of its files was named."""
    match = _SPLIT_NAME.search(path.name)
    if match is None or int(match.group(1)) == 1:
        return path
    return path.with_name(f"{path.name[: match.start()]}-00001-of-{match.group(2)}.gguf")
