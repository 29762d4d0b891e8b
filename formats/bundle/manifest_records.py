"""The records that a manifest is made of, and what must hold for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from krasis.formats.dtypes import BUNDLE_DTYPES
from krasis.formats.errors import FormatError
from krasis.formats.limits import (
    MAX_ASSET_BYTES,
    MAX_ASSET_EXPANSION,
    MAX_RANK,
    MIB,
    PAGE_BYTES,
    checked_add,
    checked_mul,
)
from krasis.formats.names import check_file_name, check_tensor_name, shown

TABLE_TIER = "table"  # hashed tables, of which a token reads a few rows from the disk
TIERS = ("dense", "gpu", "cpu", TABLE_TIER)
ASSET_SUFFIX = ".zst"
FILLER_PREFIX = "_padding."  # names of the zero-filled ranges between blobs, in a shard's header

_DIGEST = re.compile(r"[0-9a-f]{32}")
_LAYOUT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SHARD_NAME = re.compile(r"(dense|gpu|cpu|table)-\d{3,6}\.safetensors")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A shard. header_bytes: everything before the data; header_xxh3_128: the digest of those bytes."""

    name: str
    num_bytes: int
    header_bytes: int
    header_xxh3_128: str


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A tensor of a shard. offset_bytes counts from the file's start, shape is in elements of ``dtype``."""

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


def check_layouts(layouts: Mapping[str, str], where: str) -> None:
    """Tiers are known and layout ids are ids. FormatError otherwise."""
    for tier, layout in layouts.items():
        _check_tier(tier, f"{where}: layouts")
        check_layout_id(layout, f"{where}: layouts.{tier}")


def check_files(files: Iterable[FileRecord], where: str) -> None:
    """Names are those of shards and unique, sizes are possible. FormatError otherwise."""
    files = tuple(files)
    _check_unique([item.name for item in files], f"{where}: files")
    for file in files:
        _check_file(file, where)


def check_blobs(blobs: Iterable[BlobRecord], files: Iterable[FileRecord], where: str) -> None:
    """Every blob lies in its file, aligned, of its shape's size, apart from others. FormatError otherwise."""
    blobs, by_name = tuple(blobs), {file.name: file for file in files}
    _check_unique([item.name for item in blobs], f"{where}: blobs")
    ends = {file.name: file.header_bytes for file in by_name.values()}
    for blob in sorted(blobs, key=lambda blob: blob.offset_bytes):
        _check_blob(blob, by_name, ends, where)


def check_assets(assets: Iterable[AssetRecord], where: str) -> None:
    """Names are plain and unique, sizes are bounded. FormatError otherwise."""
    assets = tuple(assets)
    _check_unique([item.name for item in assets], f"{where}: assets")
    for asset in assets:
        _check_asset(asset, where)


def check_sources(sources: Iterable[SourceRecord], where: str) -> None:
    """Sizes are sizes. FormatError otherwise."""
    for source in sources:
        _check_size(source.num_bytes, f"{where}: {shown(source.name)}")


def check_layout_id(layout: str, where: str) -> None:
    """FormatError unless the id is one word of lower-case letters, digits and dashes. Whether it is known is
    for readers.
    """
    if not isinstance(layout, str) or not _LAYOUT_ID.fullmatch(layout):
        raise FormatError(
            "not a layout id", where=where, got=shown(layout), limit="like marlin-u4b8-g128-bf16"
        )


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
