"""Which files of a folder are a checkpoint's weights: by its index, by the usual names, by their numbering.

As transformers: ``model.safetensors`` first, then ``model.safetensors.index.json``. What lies beside them
(consolidated files, adapters, a second precision) is left alone, and said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import FormatError
from krasis.formats.files.file_kinds import refuse_text
from krasis.formats.files.regular_file import list_names, read_small_file
from krasis.formats.limits import MAX_FILES, MAX_INDEX_BYTES, MAX_TENSORS
from krasis.formats.names import check_file_name, check_tensor_name, shown
from krasis.formats.strict_json import parse_json_object

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Never the model: a LoRA, and copies in the publisher's own format.
_BESIDE = re.compile(r"(adapter_model|adapters?|consolidated([._-].*)?|optimizer|scheduler)\.safetensors")
_MOST_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a checkpoint begins: an index, or files that are read without one. notes: what was left alone, a
    sentence each.
    """

    index: Path | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def find_entry(path: Path) -> Entry:
    """path: a ``.safetensors`` file, an index, or a folder. Raises FormatError if the folder does not tell
    which of its files are the model.
    """
    if not path.is_dir():
        return Entry(path, (), ()) if path.name.endswith(INDEX_SUFFIX) else Entry(None, (path,), ())
    names = [name for name in list_names(path) if not name.startswith(".")]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    shards = [name for name in names if name.endswith(SUFFIX)]
    if SINGLE in shards and not (INDEX in indexes and SINGLE in read_index(path / INDEX).values()):
        return _files(path, [SINGLE], indexes, shards)
    if INDEX in indexes or len(indexes) == 1:
        return _by_index(path, INDEX if INDEX in indexes else indexes[0], indexes, shards)
    if indexes:
        raise FormatError(
            "the folder has several indexes, none of them the usual one",
            where=str(path),
            got=", ".join(indexes[:_MOST_SHOWN]),
            limit=INDEX,
            hint=f"name the one to read, for example {path / indexes[0]}",
        )
    return _without_index(path, shards)


def _by_index(folder: Path, index: str, indexes: Sequence[str], shards: Sequence[str]) -> Entry:
    named = set(read_index(folder / index).values())
    others = [name for name in indexes if name != index] + [name for name in shards if name not in named]
    return Entry(folder / index, (), _notes(folder, others, f"{index} does not name them"))


def _files(folder: Path, chosen: Sequence[str], indexes: Sequence[str], shards: Sequence[str]) -> Entry:
    others = [name for name in (*indexes, *shards) if name not in chosen]
    what = chosen[0] if len(chosen) == 1 else f"{len(chosen)} shards"
    return Entry(
        None, tuple(folder / name for name in chosen), _notes(folder, others, f"{what} is the model")
    )


def _notes(folder: Path, others: Sequence[str], reason: str) -> tuple[str, ...]:
    if not others:
        return ()
    more = f" and {len(others) - _MOST_SHOWN} more" if len(others) > _MOST_SHOWN else ""
    return (f"{folder}: {', '.join(others[:_MOST_SHOWN])}{more} left alone: {reason}",)


def _without_index(folder: Path, shards: Sequence[str]) -> Entry:
    chosen = [name for name in shards if not _BESIDE.fullmatch(name)]
    if not chosen and shards:
        _refuse_beside(folder, shards)
        chosen = list(shards)
    if not chosen:
        raise FormatError(
            "directory has no safetensors file", where=str(folder), hint="is this the right directory?"
        )
    if len(chosen) == 1 and not _NUMBERED.fullmatch(chosen[0]):
        return _files(folder, chosen, (), shards)
    sets = {(match["stem"], match["count"]) for name in chosen if (match := _NUMBERED.fullmatch(name))}
    if len(sets) != 1 or not all(map(_NUMBERED.fullmatch, chosen)):
        raise FormatError(
            "directory has several safetensors files and no index",
            where=str(folder),
            got=", ".join(chosen[:_MOST_SHOWN]),
            hint="name the one to read; the index may not have been downloaded",
        )
    ((stem, count),) = sets
    wanted = [
        f"{stem}-{number:05d}-of-{count}{SUFFIX}" for number in range(1, min(int(count), MAX_FILES) + 1)
    ]
    check_present(folder, wanted, "as the others' names say")
    note = f"{folder}: there is no index; the {len(wanted)} shards are taken by their numbering"
    entry = _files(folder, wanted, (), shards)
    return Entry(None, entry.files, (*entry.notes, note))


def _refuse_beside(folder: Path, shards: Sequence[str]) -> None:
    if any(name.startswith("adapter") for name in shards):
        raise FormatError(
            "this folder holds an adapter (LoRA), not a model",
            where=str(folder),
            got=", ".join(shards[:_MOST_SHOWN]),
            hint="merge it into its base model (peft's merge_and_unload), save that, and give its folder",
        )


def check_present(folder: Path, names: Sequence[str], why: str) -> None:
    """Raises FormatError, naming them, if files are missing that there must be; why: who says so."""
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    listed = ", ".join(shown(name) for name in missing[:_MOST_SHOWN])
    more = f" and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
    dangling = any((folder / name).is_symlink() for name in missing)
    raise FormatError(
        f"shard {listed} is missing" if len(missing) == 1 else f"shards {listed}{more} are missing",
        where=str(folder),
        got=f"{len(names) - len(missing)} of {len(names)} {why}",
        hint="it is a link that leads nowhere: copy the folder with its targets (cp -rL), or download again"
        if dangling
        else "the download may be incomplete",
    )


def read_index(path: Path) -> dict[str, str]:
    """The index's tensor -> file table, names checked. Raises FormatError."""
    where = str(path)
    data = read_small_file(path, MAX_INDEX_BYTES, follow_links=True)
    refuse_text(data, path)
    index = parse_json_object(data, where, max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("index has no weight_map", where=where, got=shown(weight_map))
    if len(weight_map) > MAX_TENSORS:
        raise FormatError("too many tensors", where=where, got=len(weight_map), limit=MAX_TENSORS)
    for name, file_name in weight_map.items():
        check_tensor_name(name, where)
        if not isinstance(file_name, str):
            raise FormatError("file name must be text", where=f"{where}: {shown(name)}", got=shown(file_name))
    file_names = set(weight_map.values())
    if len(file_names) > MAX_FILES:
        raise FormatError("too many files", where=where, got=len(file_names), limit=MAX_FILES)
    for file_name in file_names:
        check_file_name(file_name, where)
    return weight_map
