"""Where every blob of a bundle goes: a pure function from the list of blobs to files, headers and offsets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from krasis.formats.bundle.manifest_records import (
    FILLER_PREFIX,
    TIERS,
    BlobRecord,
    FileRecord,
    check_layout_id,
)
from krasis.formats.dtypes import BUNDLE_DTYPES
from krasis.formats.errors import FormatError
from krasis.formats.limits import (
    GIB,
    HUGE_PAGE_BYTES,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    PAGE_BYTES,
    align_up,
    checked_mul,
)
from krasis.formats.names import check_tensor_name, shown

DEFAULT_SHARD_BYTES = 32 * GIB
# Expert tiers are mapped in huge pages; dense blobs only need what direct I/O needs.
TIER_ALIGNMENT = {"dense": PAGE_BYTES, "gpu": HUGE_PAGE_BYTES, "cpu": HUGE_PAGE_BYTES, "table": PAGE_BYTES}
_LENGTH_BYTES = 8
# More than any entry of a blob and the filler after it adds to a header, beside its name and shape.
_ENTRY_BYTES = 256


@dataclass(frozen=True, slots=True)
class BlobSpec:
    """A blob to be written. shape in elements of ``dtype``; layout: an id from ``formats.layouts``."""

    name: str
    tier: str
    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> int:
        """Size of the data. FormatError for an unknown dtype or an absurd shape."""
        dtype = BUNDLE_DTYPES.get(self.dtype)
        if dtype is None:
            raise FormatError(
                "dtype cannot be in a bundle", where=self.name, got=self.dtype, limit=", ".join(BUNDLE_DTYPES)
            )
        return checked_mul([*self.shape, dtype.itemsize], self.name)


@dataclass(frozen=True, slots=True)
class Filler:
    """Zero bytes between blobs; a tensor of its own, because safetensors allows no holes."""

    name: str
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PlacedBlob:
    """A blob and its offset from the start of its file."""

    spec: BlobSpec
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard: its exact header (length field, JSON, spaces) and what lies behind it, end to end."""

    name: str
    tier: str
    num_bytes: int
    header: bytes
    blobs: tuple[PlacedBlob, ...]
    fillers: tuple[Filler, ...]

    def record(self) -> FileRecord:
        """The manifest's entry."""
        return FileRecord(self.name, self.num_bytes, len(self.header), xxhash.xxh3_128_hexdigest(self.header))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards of a bundle, in order of tier and number."""

    files: tuple[ShardFile, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of all shards."""
        return sum(file.num_bytes for file in self.files)

    def file_records(self) -> tuple[FileRecord, ...]:
        """The manifest's list of files."""
        return tuple(file.record() for file in self.files)

    def blob_records(self, digests: Mapping[str, str]) -> tuple[BlobRecord, ...]:
        """The manifest's list of blobs. digests: blob name -> what ``BlobSink.close`` returned. FormatError
        if one lacks.
        """
        records = []
        for file in self.files:
            for blob in file.blobs:
                spec = blob.spec
                if spec.name not in digests:
                    raise FormatError("blob was not written", where=f"{file.name}: {shown(spec.name)}")
                records.append(
                    BlobRecord(
                        name=spec.name,
                        tier=spec.tier,
                        file=file.name,
                        offset_bytes=blob.offset_bytes,
                        num_bytes=spec.num_bytes,
                        dtype=spec.dtype,
                        shape=spec.shape,
                        layout=spec.layout,
                        xxh3_128=digests[spec.name],
                    )
                )
        return tuple(records)

    def place(self, name: str) -> tuple[ShardFile, PlacedBlob]:
        """The shard and place of a blob. FormatError if it is not planned. Linear: the writer keeps its own
        table.
        """
        for file in self.files:
            for blob in file.blobs:
                if blob.spec.name == name:
                    return file, blob
        raise FormatError("blob is not part of the plan", where=shown(name))


def plan_shards(blobs: Sequence[BlobSpec], shard_bytes: int = DEFAULT_SHARD_BYTES) -> ShardPlan:
    """Lays the blobs out: by tier, in the given order, in shards of at most ``shard_bytes`` (a larger blob
    has its own).

    Equal arguments give equal plans, bytes of the headers included. Raises FormatError for a blob that cannot
    be written.
    """
    _check_specs(blobs)
    files = []
    for tier in TIERS:
        groups = _split([blob for blob in blobs if blob.tier == tier], TIER_ALIGNMENT[tier], shard_bytes)
        files += [
            _lay_out(f"{tier}-{number:03d}.safetensors", tier, group) for number, group in enumerate(groups)
        ]
    return ShardPlan(tuple(files))


def _check_specs(blobs: Sequence[BlobSpec]) -> None:
    if len(blobs) > MAX_TENSORS:
        raise FormatError("too many blobs", where="bundle", got=len(blobs), limit=MAX_TENSORS)
    names: set[str] = set()
    for blob in blobs:
        check_tensor_name(blob.name, "blob")
        if blob.name in names:
            raise FormatError("blob occurs twice", where=shown(blob.name))
        names.add(blob.name)
        if blob.name.startswith((FILLER_PREFIX, "__")):
            raise FormatError("this name is reserved", where=shown(blob.name))
        if blob.tier not in TIERS:
            raise FormatError(
                "unknown tier", where=shown(blob.name), got=shown(blob.tier), limit=", ".join(TIERS)
            )
        check_layout_id(blob.layout, shown(blob.name))
        if not 1 <= len(blob.shape) <= MAX_RANK or blob.num_bytes == 0:
            raise FormatError(
                "blob is empty or has too many dimensions", where=shown(blob.name), got=list(blob.shape)
            )


def _split(blobs: Iterable[BlobSpec], alignment: int, shard_bytes: int) -> list[list[BlobSpec]]:
    """Consecutive groups of which each makes a shard of at most ``shard_bytes``, if more than one blob."""
    groups: list[list[BlobSpec]] = []
    header = data = 0
    for blob in blobs:
        entry = _ENTRY_BYTES + 2 * len(json.dumps(blob.name)) + 20 * len(blob.shape)
        size = align_up(blob.num_bytes, alignment)
        too_large = align_up(header + entry, alignment) + data + size > shard_bytes
        if not groups or too_large or header + entry > MAX_HEADER_BYTES:
            groups.append([])
            header, data = _ENTRY_BYTES, 0
        groups[-1].append(blob)
        header += entry
        data += size
    return groups


def _lay_out(name: str, tier: str, blobs: list[BlobSpec]) -> ShardFile:
    """Every blob at a multiple of the tier's alignment, fillers in between and at the end."""
    alignment = TIER_ALIGNMENT[tier]
    entries: dict[str, object] = {"__metadata__": {"format": "krasis", "tier": tier}}
    offsets: list[int] = []
    fillers: list[Filler] = []
    position = 0  # from the start of the data, which is itself aligned
    for blob in blobs:
        offsets.append(position)
        entries[blob.name] = _entry(blob.dtype, blob.shape, position)
        position += blob.num_bytes
        gap = align_up(position, alignment) - position
        if gap:
            filler = Filler(f"{FILLER_PREFIX}{len(fillers)}", position, gap)
            entries[filler.name] = _entry("U8", (gap,), position)
            fillers.append(filler)
            position += gap
    header = encode_header(entries, alignment)
    start = len(header)
    return ShardFile(
        name=name,
        tier=tier,
        num_bytes=start + position,
        header=header,
        blobs=tuple(PlacedBlob(blob, start + offset) for blob, offset in zip(blobs, offsets, strict=True)),
        fillers=tuple(Filler(item.name, start + item.offset_bytes, item.num_bytes) for item in fillers),
    )


def _entry(dtype: str, shape: tuple[int, ...], position: int) -> dict[str, object]:
    num_bytes = checked_mul([*shape, BUNDLE_DTYPES[dtype].itemsize], "header")
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}


def encode_header(entries: Mapping[str, object], alignment: int) -> bytes:
    """Length field and JSON, with spaces up to a multiple of ``alignment`` (so that data begins there)."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    num_bytes = align_up(_LENGTH_BYTES + len(text), alignment)
    return (num_bytes - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(
        num_bytes - _LENGTH_BYTES
    )
