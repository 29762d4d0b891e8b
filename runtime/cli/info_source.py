"""Models that are no bundles yet, for a plan: a ``config.json``, a checkpoint, a GGUF, a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes
from krasis.formats.errors import FormatError, KrasisError, UsageError
from krasis.formats.hub.name import HubName, hub_name
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.models.spec import ModelSpec

MANIFEST = "manifest.json"
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_BESIDE = re.compile(r"(adapter|consolidated|optimizer|scheduler).*\.safetensors")


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that a plan is asked for. name: as the user gave it. download_bytes: of its weights on the hub,
    None if it is on the disk. commit: on the hub. kept: what a bundle can keep of quantised weights. refused:
    why they cannot be converted.
    """

    spec: ModelSpec
    name: str
    download_bytes: int | None = None
    commit: str | None = None
    kept: KeptCodes = NO_CODES
    refused: str | None = None


def planned_model(text: str) -> PlannedModel | None:
    """The model that ``text`` names, None for a bundle. Of one on the hub its config.json is fetched and
    nothing else.

    Raises UsageError if there is nothing of that name, FormatError or UnsupportedModelError for a model that
    cannot be read, and as ``hub_errors``.
    """
    name = hub_name(text)
    if name is not None:
        return _on_the_hub(name, text)
    path = Path(text)
    if path.is_dir():
        if (path / MANIFEST).exists() or not (path / "config.json").is_file():
            return None
        path = path / "config.json"
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if path.suffix == ".json" and path.name != MANIFEST:
        return _of_config(path, str(path), text)
    return None


def _of_config(path: Path, where: str, text: str, *, is_gguf: bool = False) -> PlannedModel:
    from krasis.formats.checkpoints.hf_config import read_hf_config
    from krasis.formats.checkpoints.quantised.registry import quantisation_of
    from krasis.formats.files.regular_file import read_small_file
    from krasis.formats.strict_json import parse_json_object

    data = read_small_file(path, MAX_CONFIG_BYTES, follow_links=True)
    config = parse_json_object(data, where, max_bytes=MAX_CONFIG_BYTES)
    spec = read_hf_config(config, where)
    if is_gguf:
        return PlannedModel(spec, text)
    try:
        quantised = quantisation_of(config, where)
    except KrasisError as error:
        return PlannedModel(spec, text, refused=str(error))
    return PlannedModel(spec, text, kept=NO_CODES if quantised is None else quantised.kept)


def _gguf(path: Path) -> PlannedModel:
    from krasis.formats.checkpoints.gguf import GgufCheckpoint
    from krasis.formats.models.registry import spec_from_gguf

    checkpoint = GgufCheckpoint.open(path)
    return PlannedModel(spec_from_gguf(checkpoint.metadata, checkpoint.tensors, str(path)), str(path))


def _on_the_hub(name: HubName, text: str) -> PlannedModel:
    from krasis.formats.hub.gguf_files import choose_gguf
    from krasis.formats.hub.repository import open_or_cached

    found = open_or_cached(name)
    if isinstance(found, Path):
        if not (found / "config.json").is_file():
            raise FormatError("the cache holds no config.json of this model", where=str(name), got=str(found))
        return _of_config(found / "config.json", str(name), text, is_gguf=name.variant is not None)
    if "config.json" not in found.files:
        raise UsageError(
            "this model has no config.json on the hub, which a plan is made from",
            where=str(name),
            hint="name the model that it was made of",
        )
    if found.file("config.json").num_bytes > MAX_CONFIG_BYTES:
        raise FormatError("its config.json is too large", where=str(name), limit=f"{MAX_CONFIG_BYTES} bytes")
    config, where = found.fetch("config.json"), f"{name}: config.json"
    model = _of_config(config, where, text, is_gguf=name.variant is not None)
    if name.variant is not None:
        weights: Iterable[str] = choose_gguf(found.files, name.variant, str(name))
    else:
        weights = _weights(found.files)
    return replace(model, download_bytes=found.num_bytes(weights), commit=found.commit)


def _weights(names: Iterable[str]) -> list[str]:
    """The files that a conversion would fetch, told by their names alone: an index is megabytes."""
    shards = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    usual = [name for name in shards if name == "model.safetensors"]
    numbered = [name for name in shards if _NUMBERED.fullmatch(name)]
    return usual or numbered or [name for name in shards if not _BESIDE.fullmatch(name)]
