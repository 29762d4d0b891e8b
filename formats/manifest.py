"""``manifest.json``: what a bundle holds. Written last, canonical, and strict when read.

Canonical means: the same manifest is always the same bytes (sorted keys, one-space indent, ASCII, no time stamps), and
bytes that are not canonical are refused. The field ``checksum`` covers all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash

from krasis.formats.architecture import Architecture
from krasis.formats.dtypes import BUNDLE_DTYPES
from krasis.formats.errors import ChecksumError, FormatError, VersionError
from krasis.formats.limits import (
    MAX_ASSET_BYTES,
    MAX_ASSET_EXPANSION,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    MIB,
    PAGE_BYTES,
    checked_add,
    checked_mul,
)
from krasis.formats.names import check_file_name, check_tensor_name, shown
from krasis.formats.strict_json import parse_json_object

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "krasis-bundle"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0
TIERS = ("dense", "gpu", "cpu")
ASSET_SUFFIX = ".zst"

_DIGEST = re.compile(r"[0-9a-f]{32}")
_LAYOUT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SHARD_NAME = re.compile(r"(dense|gpu|cpu)-\d{3,6}\.safetensors")
_MAX_TEXT = 1000
_KEYS = {
    "architecture",
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
class FileRecord:
    """A shard. header_bytes: everything before the data; header_xxh3_128: the digest of those bytes."""

    name: str
    num_bytes: int
    header_bytes: int
    header_xxh3_128: str


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A tensor of a shard. offset_bytes counts from the start of the file, shape is in elements of ``dtype``."""

    name: str
    tier: str
    file: str
    offset_bytes: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    layout: str
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class AssetRecord:
    """A text file, compressed. num_bytes and the digest are of the compressed file."""

    name: str
    file: str
    num_bytes: int
    decompressed_bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A file that the bundle was made from. kind and digest are free text, for people and for comparison."""

    name: str
    kind: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a bundle but its data. layouts: tier -> layout id. recipe and quality: any JSON objects."""

    tool_version: str
    architecture: Architecture
    layouts: Mapping[str, str]
    files: tuple[FileRecord, ...]
    blobs: tuple[BlobRecord, ...]
    assets: tuple[AssetRecord, ...]
    sources: tuple[SourceRecord, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    format_major: int = FORMAT_MAJOR
    format_minor: int = FORMAT_MINOR

    def to_bytes(self) -> bytes:
        """The file's bytes. FormatError if the manifest contradicts itself (see ``check``) or is too large."""
        self.check(MANIFEST_NAME)
        record = {
            "format": FORMAT_NAME,
            "format_major": self.format_major,
            "format_minor": self.format_minor,
            "tool_version": self.tool_version,
            "architecture": self.architecture.to_json(),
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

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Reads ``to_bytes``'s form.

        Raises VersionError for a newer format, ChecksumError for altered bytes, FormatError for anything else that is
        not exactly a manifest.
        """
        record = parse_json_object(data, where, max_bytes=MAX_MANIFEST_BYTES)
        is_newer = _check_version(record, where)
        unknown = sorted(record.keys() - _KEYS)
        if unknown and is_newer:
            raise _newer(record, where, f"field {shown(unknown[0])}")
        if unknown or (missing := sorted(_KEYS - record.keys())):
            problem = ("unknown field", unknown[0]) if unknown else ("field is missing", missing[0])
            raise FormatError(problem[0], where=where, got=shown(problem[1]))
        _check_bytes(record, data, where)
        manifest = cls(
            tool_version=_text(record["tool_version"], f"{where}: tool_version"),
            architecture=Architecture.from_json(
                _object(record["architecture"], where), f"{where}: architecture"
            ),
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
        """FormatError unless names are plain and unique, and every blob lies in its file, aligned, apart from others."""
        _check_unique([item.name for item in self.files], f"{where}: files")
        _check_unique([item.name for item in self.blobs], f"{where}: blobs")
        _check_unique([item.name for item in self.assets], f"{where}: assets")
        _check_unique([item.file for item in self.assets], f"{where}: assets")
        for tier, layout in self.layouts.items():
            _check_tier(tier, f"{where}: layouts")
            check_layout_id(layout, f"{where}: layouts.{tier}")
        for file in self.files:
            _check_file(file, where)
        by_name = {file.name: file for file in self.files}
        ends = {file.name: file.header_bytes for file in self.files}
        for blob in sorted(self.blobs, key=lambda blob: blob.offset_bytes):
            _check_blob(blob, by_name, ends, where)
        for asset in self.assets:
            _check_asset(asset, where)
        for source in self.sources:
            _check_size(source.num_bytes, f"{where}: {shown(source.name)}")


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Sorted keys, indent 1, ASCII, one newline at the end. FormatError for what JSON cannot hold (NaN, infinity)."""
    try:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise FormatError("value cannot be written as JSON", where=MANIFEST_NAME, got=error) from error
    return text.encode("ascii") + b"\n"


def check_layout_id(layout: str, where: str) -> None:
    """FormatError unless the id is one word of lower-case letters, digits and dashes. Whether it is known is for readers."""
    if not isinstance(layout, str) or not _LAYOUT_ID.fullmatch(layout):
        raise FormatError(
            "not a layout id", where=where, got=shown(layout), limit="like marlin-u4b8-g128-bf16"
        )


# ---- reading -----------------------------------------------------------------------------------------------


def _check_version(record: Mapping[str, Any], where: str) -> bool:
    """Whether the minor version is newer than ours. Comes before all other checks: a newer format may change anything."""
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
    return VersionError(
        f"the bundle has a newer format than this program reads: {what}",
        where=where,
        got=f"format {record['format_major']}.{record['format_minor']}, written by {shown(record.get('tool_version'))}",
        limit=f"format {FORMAT_MAJOR}.{FORMAT_MINOR}",
        hint="upgrade krasis-bundle, or convert the model again with this version",
    )


def _check_bytes(record: dict[str, Any], data: bytes, where: str) -> None:
    """The checksum, then the form: a flip in white space is found too."""
    stated = record["checksum"]
    actual = _checksum({key: value for key, value in record.items() if key != "checksum"})
    if stated != actual:
        raise ChecksumError(
            "manifest was altered",
            where=f"{where}: checksum",
            got=actual,
            limit=shown(stated),
            hint="get the bundle again, or convert the model again",
        )
    if canonical_json(record) != data:
        raise FormatError(
            "manifest is not in canonical form", where=where, hint="it must not be edited by hand"
        )


def _checksum(record: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(canonical_json(record)))


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


# ---- consistency -------------------------------------------------------------------------------------------


def _check_unique(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FormatError("name occurs twice", where=where, got=shown(name))
        seen.add(name)


def _check_size(num_bytes: int, where: str) -> None:
    checked_add([num_bytes], where)


def _check_digest(digest: str, where: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise FormatError(
            "not an XXH3-128 digest", where=where, got=shown(digest), limit="32 hexadecimal digits"
        )


def _check_tier(tier: str, where: str) -> None:
    if tier not in TIERS:
        raise FormatError("unknown tier", where=where, got=shown(tier), limit=", ".join(TIERS))


def _check_file(file: FileRecord, where: str) -> None:
    check_file_name(file.name, f"{where}: files")
    where = f"{where}: {shown(file.name)}"
    if not _SHARD_NAME.fullmatch(file.name):
        raise FormatError("not the name of a shard", where=where, limit="like cpu-000.safetensors")
    _check_size(file.num_bytes, where)
    if not PAGE_BYTES <= file.header_bytes <= file.num_bytes or file.header_bytes % PAGE_BYTES:
        raise FormatError(
            "impossible size of a header", where=where, got=file.header_bytes, limit=file.num_bytes
        )
    _check_digest(file.header_xxh3_128, where)


def _check_blob(blob: BlobRecord, files: Mapping[str, FileRecord], ends: dict[str, int], where: str) -> None:
    """Blobs come in order of offset; ends has the end of the last one of each file, and is advanced."""
    check_tensor_name(blob.name, f"{where}: blobs")
    where = f"{where}: {shown(blob.name)}"
    _check_tier(blob.tier, where)
    check_layout_id(blob.layout, where)
    _check_digest(blob.xxh3_128, where)
    file = files.get(blob.file)
    if file is None:
        raise FormatError(
            "blob is in a file that the manifest does not list", where=where, got=shown(blob.file)
        )
    if not blob.file.startswith(f"{blob.tier}-"):
        raise FormatError(
            "blob is in a file of another tier", where=where, got=shown(blob.file), limit=blob.tier
        )
    if blob.dtype not in BUNDLE_DTYPES:
        raise FormatError("unknown dtype", where=where, got=shown(blob.dtype), limit=", ".join(BUNDLE_DTYPES))
    if not 1 <= len(blob.shape) <= MAX_RANK:
        raise FormatError(
            "blob has an impossible rank", where=where, got=len(blob.shape), limit=f"1..{MAX_RANK}"
        )
    num_bytes = checked_mul([*blob.shape, BUNDLE_DTYPES[blob.dtype].itemsize], where)
    if num_bytes != blob.num_bytes or num_bytes == 0:
        raise FormatError(
            "blob has another size than its shape", where=where, got=blob.num_bytes, limit=num_bytes
        )
    if blob.offset_bytes < 0 or blob.offset_bytes % PAGE_BYTES:
        raise FormatError(
            "blob is not aligned", where=where, got=blob.offset_bytes, limit=f"multiples of {PAGE_BYTES}"
        )
    if blob.offset_bytes < ends[blob.file]:
        raise FormatError(
            "blobs overlap", where=where, got=f"offset {blob.offset_bytes}", limit=f">= {ends[blob.file]}"
        )
    end = checked_add([blob.offset_bytes, num_bytes], where)
    if end > file.num_bytes:
        raise FormatError(
            "blob exceeds its file", where=where, got=f"end {end}", limit=f"{file.num_bytes} bytes"
        )
    ends[blob.file] = end


def _check_asset(asset: AssetRecord, where: str) -> None:
    check_file_name(asset.name, f"{where}: assets")
    where = f"{where}: {shown(asset.name)}"
    if asset.file != asset.name + ASSET_SUFFIX or asset.name.startswith("."):
        raise FormatError(
            "asset has an unexpected file name", where=where, got=shown(asset.file), limit=asset.name + ".zst"
        )
    _check_digest(asset.xxh3_128, where)
    _check_size(asset.num_bytes, where)
    limit = max_asset_bytes(asset.num_bytes)
    if not 0 <= asset.decompressed_bytes <= limit:
        raise FormatError("asset would be too large", where=where, got=asset.decompressed_bytes, limit=limit)


def max_asset_bytes(compressed_bytes: int) -> int:
    """What an asset of that size on disk may decompress to: text does not shrink a thousandfold, bombs do."""
    return min(MAX_ASSET_BYTES, MIB + MAX_ASSET_EXPANSION * compressed_bytes)
