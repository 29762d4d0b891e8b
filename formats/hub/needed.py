"""Which files of a repository a conversion needs: weights of one form, and the text files beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from krasis.formats.checkpoints.shard_index import INDEX_SUFFIX, SUFFIX, check_present, find_entry, read_index
from krasis.formats.errors import FormatError
from krasis.formats.hub.gguf_files import choose_gguf, gguf_models

# Text files of a checkpoint; what is not there is not missed.
TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Where quantisers say what they did to the weights.
_SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json")


@dataclass(frozen=True, slots=True)
class Needed:
    """kind: of the checkpoint. weights: its large files, in order. texts: the small ones."""

    kind: Literal["hf", "gguf"]
    weights: tuple[str, ...]
    texts: tuple[str, ...]


def needed_files(
    names: Iterable[str], variant: str | None, where: str, fetch: Callable[[str], Path]
) -> Needed:
    """What of a repository's files is needed. fetch: gives a small file (an index).

    Raises UsageError where the name does not tell which model is meant, FormatError where there is none.
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    has_weights = any(name.endswith(SUFFIX) for name in top)
    if variant is None and has_weights and "config.json" in top:
        indexes = [name for name in top if name.endswith(INDEX_SUFFIX)]
        shards = [name for name in top if name.endswith(SUFFIX)]
        weights = _shards(shards, {name: fetch(name) for name in indexes}, where)
        texts = [name for name in (*TEXT_FILES, *_SIDE_FILES, *indexes) if name in top]
        return Needed("hf", weights, tuple(texts))
    if variant is not None or gguf_models(names):
        return Needed("gguf", choose_gguf(names, variant, where), ())
    raise FormatError(
        "there is no model of a form that can be read on the hub under this name",
        where=where,
        got=", ".join(top[:4]) or "no files",
        limit="config.json with *.safetensors, or *.gguf",
    )


def _shards(shards: list[str], indexes: dict[str, Path], where: str) -> tuple[str, ...]:
    """The weights among a folder's files, by the same rules as for a folder on the disk."""
    with tempfile.TemporaryDirectory(prefix="krasis-hub-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        for name in shards:
            (folder / name).touch()
        for name, path in indexes.items():
            (folder / name).symlink_to(path.resolve())
        try:
            entry = find_entry(folder)
            if entry.index is None:
                return tuple(path.name for path in entry.files)
            found = sorted(set(read_index(entry.index).values()))
            check_present(folder, found, f"that {entry.index.name} names")
        except FormatError as error:
            place, hint = (text.replace(str(folder), where) for text in (error.where, error.hint))
            raise type(error)(error.what, where=place, got=error.got, limit=error.limit, hint=hint) from error
        return tuple(found)
