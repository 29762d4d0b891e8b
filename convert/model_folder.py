"""What a folder given as input holds: a checkpoint, GGUF files, a hub cache, or things that are neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.files.file_kinds import PICKLE_HINT
from krasis.formats.files.pieces import pieces_among, pieces_error
from krasis.formats.files.regular_file import list_names
from krasis.formats.hub.gguf_files import BESIDE, SPLIT_NAME
from krasis.formats.names import shown

# BESIDE: each is told apart by its metadata if it is given itself.
_PICKLES = re.compile(r"(pytorch_model.*\.bin|.*\.(pth|pt|ckpt|pkl|bin))(\.index\.json)?", re.IGNORECASE)
_OTHERS = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".npz": "NumPy",
    ".nemo": "NeMo",
    ".tflite": "TensorFlow Lite",
    ".zip": "a zip archive",
    ".tar": "a tar archive",
    ".gz": "a gzip archive",
    ".zst": "a Zstandard archive",
    ".xz": "an xz archive",
    ".7z": "a 7z archive",
}
_MOST_SHOWN = 4

Kind = Literal["hf", "gguf"]


def recognise_folder(path: Path) -> tuple[Kind, Path, tuple[str, ...]]:
    """(kind, what to open, notes). Raises UsageError where the folder does not tell which of several models
    is meant, FormatError where it holds none.
    """
    path, notes = resolve_hub_cache(path)
    names = [name for name in list_names(path) if not name.startswith(".")]
    if "manifest.json" in names and not any(name.endswith(".gguf") for name in names):
        raise UsageError(
            "this is a Krasis bundle already", where=str(path), hint="krasis-run takes it as it is"
        )
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if (path / "config.json").exists() and has_weights:
        if (path / "original").is_dir():
            notes = (
                *notes,
                f"{path}: the folder 'original' is left alone: it holds the publisher's own format",
            )
        return "hf", path, notes
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        name, more = _choose_gguf(path, ggufs)
        return "gguf", path / name, (*notes, *more)
    raise _no_model(path, names, has_weights=has_weights)


def _choose_gguf(folder: Path, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The GGUF to open of a folder's: the only model, what lies beside it set aside."""
    models: dict[tuple[str, str], str] = {}
    for name in names:
        match = SPLIT_NAME.fullmatch(name)
        models.setdefault((match["stem"], match["count"]) if match else (name, ""), name)
    chosen = [name for name in models.values() if not BESIDE.search(name)] or list(models.values())
    if len(chosen) > 1:
        more = f" and {len(chosen) - _MOST_SHOWN} more" if len(chosen) > _MOST_SHOWN else ""
        raise UsageError(
            "this folder holds several GGUF models",
            where=str(folder),
            got=", ".join(chosen[:_MOST_SHOWN]) + more,
            hint=f"name one, for example {folder / chosen[0]}",
        )
    aside = [name for name in models.values() if name not in chosen]
    notes = (f"{folder}: {', '.join(aside[:_MOST_SHOWN])} left alone: not the model itself",) if aside else ()
    return chosen[0], notes


def _no_model(path: Path, names: Sequence[str], *, has_weights: bool) -> FormatError:
    """The error that says why a folder is no model, and the way out."""
    where = str(path)
    for pieces in pieces_among(names).values():
        return pieces_error(path, pieces)
    dangling = [name for name in names if (path / name).is_symlink() and not (path / name).exists()]
    if dangling:
        return FormatError(
            "links of this folder lead nowhere",
            where=where,
            got=", ".join(dangling[:_MOST_SHOWN]),
            hint="copy it with what they point to (cp -rL), or download the model again",
        )
    if not has_weights and (other := _other_weights(names)) is not None:
        what, found, hint = other
        return FormatError(
            f"this folder holds its weights only {what}",
            where=where,
            got=", ".join(found[:_MOST_SHOWN]),
            hint=hint,
        )
    below = [name for name in names if _is_model(path / name)]
    missing = "safetensors files" if "config.json" in names else "config.json"
    hint = "give the folder of the checkpoint"
    if below:
        hint = f"the model may be in a folder below: give {path / below[0]}"
    elif has_weights and "params.json" in names:
        hint = "this is the publisher's own format: give the Hugging Face form of the checkpoint"
    elif "adapter_config.json" in names:
        hint = "this is an adapter (LoRA): merge it into its base model and give the result"
    elif has_weights:
        hint = "its config.json was not downloaded: get it too"
    elif "config.json" in names:
        hint = "the weights were not downloaded: get *.safetensors and their index too"
    return FormatError(f"this folder is no model: it has no {missing}", where=where, hint=hint)


def _other_weights(names: Sequence[str]) -> tuple[str, list[str], str] | None:
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    if pickles:
        return "as PyTorch pickles, which Krasis never opens: they can run any code", pickles, PICKLE_HINT
    for suffix, name in _OTHERS.items():
        if found := [one for one in names if one.endswith(suffix)]:
            hint = (
                "unpack it and give the folder" if "archive" in name else "get the checkpoint in safetensors"
            )
            return f"as {name}", found, hint
    return None


def _is_model(path: Path) -> bool:
    """Whether a folder looks like a checkpoint or holds GGUF files."""
    if not path.is_dir():
        return False
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return False
    return any(name.endswith((".gguf", ".safetensors")) for name in names)


# ---- the hub's cache ---------------------------------------------------------------------------------------


def resolve_hub_cache(path: Path) -> tuple[Path, tuple[str, ...]]:
    """A model's folder in the hub's cache (``models--org--name``) to its snapshot, where that is clear; and a
    note.

    Raises UsageError where it is not, naming the candidates.
    """
    if path.name == "snapshots" and (path.parent / "blobs").is_dir():
        path = path.parent
    snapshots = path / "snapshots"
    if snapshots.is_dir() and not (path / "config.json").exists():
        chosen = _snapshot(path, snapshots)
        return chosen, (f"{path} is a folder of the hub's cache: its snapshot {chosen.name} is taken",)
    models = [name for name in list_names(path) if name.startswith("models--")]
    inside = [name for name in models if (path / name / "snapshots").is_dir()]
    if len(inside) == 1:
        return resolve_hub_cache(path / inside[0])
    if inside:
        raise UsageError(
            "this folder is a hub cache with several models",
            where=str(path),
            got=", ".join(shown(name) for name in inside[:_MOST_SHOWN]),
            hint=f"name one, for example {path / inside[0]}",
        )
    return path, ()


def _snapshot(path: Path, snapshots: Path) -> Path:
    found = [name for name in list_names(snapshots) if (snapshots / name).is_dir()]
    try:
        main = (path / "refs" / "main").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    if main in found:
        return snapshots / main
    if len(found) == 1:
        return snapshots / found[0]
    if not found:
        raise FormatError(
            "this folder of the hub's cache holds no snapshot",
            where=str(path),
            hint="download the model first, for example with 'hf download'",
        )
    raise UsageError(
        "this folder of the hub's cache holds several snapshots and none is the main one",
        where=str(path),
        got=", ".join(shown(name) for name in found[:_MOST_SHOWN]),
        hint=f"name one, for example {snapshots / found[0]}",
    )


def missing_path_hint(path: Path) -> str:
    """What to say of an input that does not exist: how to say that a name on the hub is meant, or nothing."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.@:-]*", str(path)):
        return f"if it is a model's name on the hub, give hf://{path}"
    return ""
