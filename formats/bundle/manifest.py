"""``manifest.json``: what a bundle holds. Written last, canonical, and strict when read.

Canonical means: the same manifest is always the same bytes (sorted keys, one-space indent, ASCII, no time
stamps), and bytes that are not canonical are refused. The field ``checksum`` covers all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.manifest_records import (
    AssetRecord,
    BlobRecord,
    FileRecord,
    SourceRecord,
    check_assets,
    check_blobs,
    check_files,
    check_layouts,
    check_sources,
)
from krasis.formats.errors import ChecksumError, FormatError, VersionError
from krasis.formats.limits import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_REMARK_CHARACTERS,
    MAX_REMARK_VALUES,
    MAX_TENSORS,
)
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.uniform import architecture_of, spec_of
from krasis.formats.names import shown
from krasis.formats.strict_json import parse_json_object

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "MANIFEST_NAME",
    "AssetRecord",
    "BlobRecord",
    "FileRecord",
    "Manifest",
    "SourceRecord",
    "canonical_json",
]

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "krasis-bundle"
FORMAT_MAJOR = 1
FORMAT_MINOR = 2
_MINOR_OF_MODEL = 1  # from here on a model is described by ``model``, before by ``architecture``
_MINOR_OF_TABLES = 2  # hashed tables, a tier of their own

_MAX_TEXT = 1000
_KEYS = {
    "assets",
    "blobs",
    "checksum",
    "files",
    "format",
    "format_major",
    "format_minor",
    "layouts",
    "quality",
    "recipe",
    "sources",
    "tool_version",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a bundle but its data. layouts: tier -> layout id. recipe and quality: any JSON objects."""

    tool_version: str
    spec: ModelSpec
    layouts: Mapping[str, str]
    files: tuple[FileRecord, ...]
    blobs: tuple[BlobRecord, ...]
    assets: tuple[AssetRecord, ...]
    sources: tuple[SourceRecord, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    format_major: int = FORMAT_MAJOR
    format_minor: int = _MINOR_OF_MODEL

    @property
    def architecture(self) -> Architecture:
        """The model as a flat record. Raises UnsupportedModelError for one that this cannot describe."""
        return architecture_of(self.spec, MANIFEST_NAME)

    def to_bytes(self) -> bytes:
        """The file's bytes. FormatError if the manifest contradicts itself or is too large."""
        self.check(MANIFEST_NAME)
        record = {
            "format": FORMAT_NAME,
            "format_major": self.format_major,
            "format_minor": self.format_minor,
            "tool_version": self.tool_version,
            **self._model(),
            "layouts": dict(self.layouts),
            "files": [_to_json(item) for item in self.files],
            "blobs": [_to_json(item) for item in self.blobs],
            "assets": [_to_json(item) for item in self.assets],
            "sources": [_to_json(item) for item in self.sources],
            "recipe": dict(self.recipe),
            "quality": dict(self.quality),
        }
        data = canonical_json({**record, "checksum": _checksum(record)})
        if len(data) > MAX_MANIFEST_BYTES:
            raise FormatError(
                "manifest is too large", where=MANIFEST_NAME, got=len(data), limit=MAX_MANIFEST_BYTES
            )
        return data

    def _model(self) -> dict[str, Any]:
        """The field that describes the model, as the manifest's minor version has it."""
        if self.format_minor < _MINOR_OF_MODEL:
            return {"architecture": self.architecture.to_json()}
        return {"model": self.spec.to_json()}

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Reads ``to_bytes``'s form.

        Raises VersionError for a newer format, ChecksumError for altered bytes, FormatError for anything else
        that is not exactly a manifest.
        """
        record = parse_json_object(data, where, max_bytes=MAX_MANIFEST_BYTES)
        is_newer = _check_version(record, where)
        keys = _KEYS | {_model_key(record)}
        unknown = sorted(record.keys() - keys)
        if unknown and is_newer:
            raise _newer(record, where, f"field {shown(unknown[0])}")
        if unknown or (missing := sorted(keys - record.keys())):
            problem = ("unknown field", unknown[0]) if unknown else ("field is missing", missing[0])
            raise FormatError(problem[0], where=where, got=shown(problem[1]))
        for key in ("recipe", "quality"):
            _check_remark(record[key], f"{where}: {key}")
        _check_bytes(record, data, where)
        try:
            manifest = cls._from_record(record, where)
        except FormatError as error:
            if is_newer:  # sound by its checksum: what we cannot read is an addition, not damage
                raise _newer(record, where, str(error)) from error
            raise
        return manifest

    @classmethod
    def _from_record(cls, record: Mapping[str, Any], where: str) -> Manifest:
        manifest = cls(
            tool_version=_text(record["tool_version"], f"{where}: tool_version"),
            spec=_spec(record, where),
            layouts=_object(record["layouts"], f"{where}: layouts"),
            files=_records(FileRecord, record["files"], f"{where}: files", MAX_FILES),
            blobs=_records(BlobRecord, record["blobs"], f"{where}: blobs", MAX_TENSORS),
            assets=_records(AssetRecord, record["assets"], f"{where}: assets", MAX_FILES),
            sources=_records(SourceRecord, record["sources"], f"{where}: sources", MAX_FILES),
            recipe=_object(record["recipe"], f"{where}: recipe"),
            quality=_object(record["quality"], f"{where}: quality"),
            format_major=record["format_major"],
            format_minor=record["format_minor"],
        )
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """FormatError unless names are plain and unique, and every blob lies in its file, aligned, apart from
        others.
        """
        check_layouts(self.layouts, where)
        check_files(self.files, where)
        check_blobs(self.blobs, self.files, where)
        check_assets(self.assets, where)
        check_sources(self.sources, where)


def minor_of(spec: ModelSpec) -> int:
    """The least minor version whose readers know all that a bundle of the model has."""
    return _MINOR_OF_TABLES if any(layer.ngram for layer in spec.layers) else _MINOR_OF_MODEL


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Sorted keys, indent 1, ASCII, one newline at the end. FormatError for what JSON cannot hold (NaN,
    infinity).
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise FormatError("value cannot be written as JSON", where=MANIFEST_NAME, got=error) from error
    return text.encode("ascii") + b"\n"


def _model_key(record: Mapping[str, Any]) -> str:
    return "model" if record["format_minor"] >= _MINOR_OF_MODEL else "architecture"


def _spec(record: Mapping[str, Any], where: str) -> ModelSpec:
    key = _model_key(record)
    value = _object(record[key], f"{where}: {key}")
    if key == "architecture":
        return spec_of(Architecture.from_json(value, f"{where}: {key}"))
    spec = ModelSpec.from_json(value, f"{where}: {key}")
    # A default spelled out, or a layer twice, would be the same model in other bytes.
    if canonical_json(spec.to_json()) != canonical_json(value):
        raise FormatError(
            "the model is not in canonical form",
            where=f"{where}: {key}",
            hint="it must not be edited by hand",
        )
    return spec


# ---- reading -----------------------------------------------------------------------------------------------


def _check_version(record: Mapping[str, Any], where: str) -> bool:
    """Whether the minor version is newer than ours. Comes before all other checks: a newer format may change
    anything.
    """
    if record.get("format") != FORMAT_NAME:
        raise FormatError(
            "not the manifest of a bundle", where=f"{where}: format", got=shown(record.get("format"))
        )
    versions = [record.get("format_major"), record.get("format_minor")]
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in versions) or versions[0] == 0:
        raise FormatError("impossible format version", where=f"{where}: format_major", got=shown(versions))
    if record["format_major"] > FORMAT_MAJOR:
        raise _newer(record, where, "it may differ in everything")
    return bool(record["format_minor"] > FORMAT_MINOR)


def _newer(record: Mapping[str, Any], where: str, what: str) -> VersionError:
    writer = shown(record.get("tool_version"))
    return VersionError(
        f"the bundle has a newer format than this program reads: {what}",
        where=where,
        got=f"format {record['format_major']}.{record['format_minor']}, written by {writer}",
        limit=f"format {FORMAT_MAJOR}.{FORMAT_MINOR}",
        hint="upgrade krasis-bundle, or convert the model again with this version",
    )


def _check_bytes(record: dict[str, Any], data: bytes, where: str) -> None:
    """The checksum, then the form: a flip in white space is found too."""
    stated = record["checksum"]
    form = canonical_json(record)
    # The record without its checksum: one line less. Writing it anew takes as long as reading the manifest.
    line = b' "checksum": ' + json.dumps(stated).encode("ascii") + b",\n"
    actual = str(xxhash.xxh3_128_hexdigest(form.replace(b"\n" + line, b"\n", 1)))
    if stated != actual:
        raise ChecksumError(
            "manifest was altered",
            where=f"{where}: checksum",
            got=actual,
            limit=shown(stated),
            hint="get the bundle again, or convert the model again",
        )
    if form != data:
        raise FormatError(
            "manifest is not in canonical form", where=where, hint="it must not be edited by hand"
        )


def _checksum(record: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(canonical_json(record)))


def _check_remark(value: Any, where: str) -> None:
    """FormatError for a record of free form that is too large to be read, written and shown at once."""
    num_values = num_characters = 0
    stack = [value]
    while stack:
        item = stack.pop()
        num_values += 1
        if isinstance(item, dict):
            stack.extend(item.values())
            num_characters += sum(map(len, item))
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str):
            num_characters += len(item)
        if num_values + len(stack) > MAX_REMARK_VALUES or num_characters > MAX_REMARK_CHARACTERS:
            raise FormatError(
                "the record is too large",
                where=where,
                limit=f"{MAX_REMARK_VALUES} values, {MAX_REMARK_CHARACTERS} characters",
                hint="the manifest may be damaged or hostile: get the bundle from a source you trust",
            )


Record = TypeVar("Record", FileRecord, BlobRecord, AssetRecord, SourceRecord)


def _to_json(record: FileRecord | BlobRecord | AssetRecord | SourceRecord) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in type(record).__slots__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _records(cls: type[Record], value: Any, where: str, limit: int) -> tuple[Record, ...]:
    if not isinstance(value, list) or len(value) > limit:
        raise FormatError(
            "field must be a list of bounded length", where=where, got=shown(value), limit=limit
        )
    return tuple(_record(cls, item, f"{where}[{index}]") for index, item in enumerate(value))


def _record(cls: type[Record], value: Any, where: str) -> Record:
    names = cls.__slots__
    if not isinstance(value, dict) or value.keys() != set(names):
        got = sorted(value) if isinstance(value, dict) else value
        raise FormatError(
            "record has other fields", where=where, got=shown(got), limit=", ".join(sorted(names))
        )
    return cls(**{name: _record_field(name, value[name], f"{where}.{name}") for name in names})


def _record_field(name: str, value: Any, where: str) -> Any:
    if name.endswith("_bytes"):
        if type(value) is not int:
            raise FormatError("field must be an integer", where=where, got=shown(value))
        return value
    if name == "shape":
        if not isinstance(value, list) or not all(type(size) is int for size in value):
            raise FormatError("field must be a list of integers", where=where, got=shown(value))
        return tuple(value)
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise FormatError(
            "field must be short text", where=where, got=shown(value), limit=f"{_MAX_TEXT} characters"
        )
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError("field must be an object", where=where, got=shown(value))
    return value
