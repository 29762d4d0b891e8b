"""The parser of GGUF headers: a cursor over mapped bytes in which every step is bounded by what the file
still has.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from krasis.formats.checkpoints.foreign_ggml_types import explain_type
from krasis.formats.checkpoints.ggml_blocks import TYPE_NAMES, tensor_bytes
from krasis.formats.errors import FormatError
from krasis.formats.limits import MAX_HEADER_BYTES, MAX_TENSORS, MIB, align_up, checked_add
from krasis.formats.names import check_tensor_name, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_MAX_PAIRS = 100_000
_MAX_KEY_BYTES = 65_535
_MAX_STRING_BYTES = 64 * MIB
_MAX_ARRAY_DEPTH = 4
_MAX_ARRAY_ITEMS = 4_000_000  # of all arrays together; the largest vocabularies have 300,000 tokens
_MAX_RANK = 4
_MAX_DIMENSION = 1 << 48
_MAX_ALIGNMENT = MIB

# Least bytes that a pair (key length, one-byte key, type, value) and a tensor's record can have.
_MIN_PAIR_BYTES = 14
_MIN_TENSOR_BYTES = 33

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

GgufValue = int | float | bool | str | list["GgufValue"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file. shape is row-major; offset_bytes counts from the start of the file."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


def parse_gguf_header(data: memoryview, where: str) -> tuple[dict[str, GgufValue], dict[str, GgufTensor]]:
    """(metadata, tensors) of a whole file's bytes. FormatError for anything unsound, naming key or tensor."""
    cursor = _Cursor(data, where)
    num_tensors, num_pairs = _read_counts(cursor)
    metadata: dict[str, GgufValue] = {}
    for _ in range(num_pairs):
        key = cursor.string("metadata key", _MAX_KEY_BYTES)
        if not key:
            raise FormatError("metadata key is empty", where=where, got=f"before byte {cursor.position}")
        if key in metadata:
            raise FormatError("metadata key occurs twice", where=f"{where}: {shown(key)}")
        cursor.what = key
        metadata[key] = _read_value(cursor, cursor.scalar(_U32), depth=0)
        cursor.what = ""
    records = [_read_record(cursor) for _ in range(num_tensors)]
    alignment = _alignment(metadata, where)
    data_start = align_up(cursor.position, alignment)
    return metadata, _place_tensors(records, data_start, alignment, len(data), where)


def gguf_header_bytes(data: memoryview, where: str) -> int:
    """Where the tensors' records end. FormatError if ``data`` ends before that, or is unsound."""
    cursor = _Cursor(data, where)
    num_tensors, num_pairs = _read_counts(cursor)
    for _ in range(num_pairs):
        cursor.string("metadata key", _MAX_KEY_BYTES)
        _read_value(cursor, cursor.scalar(_U32), depth=0)
    for _ in range(num_tensors):
        _read_record(cursor)
    return cursor.position


class _Cursor:
    """A position in the header; every read checks the bytes that are left."""

    __slots__ = ("_end", "_items_left", "data", "position", "what", "where")

    def __init__(self, data: memoryview, where: str) -> None:
        self.data, self.where = data, where
        self.position = 0
        self.what = ""  # the key or tensor being read
        self._end = min(len(data), MAX_HEADER_BYTES)
        self._items_left = _MAX_ARRAY_ITEMS

    def location(self) -> str:
        """File and what is being read, for messages."""
        return f"{self.where}: {shown(self.what)}" if self.what else self.where

    def need(self, num_bytes: int, what: str) -> None:
        """FormatError unless the header can still hold ``num_bytes``."""
        if num_bytes > self._end - self.position:
            is_cut = self._end == len(self.data)
            raise FormatError(
                f"{what} exceeds the {'file' if is_cut else 'bound on a header'}",
                where=self.location(),
                got=f"{num_bytes} bytes at {self.position}",
                limit=f"{self._end - self.position} bytes left",
                hint="the download may be incomplete, or the file is damaged",
            )

    def count_items(self, count: int) -> None:
        """FormatError if the header's arrays have too many items: in Python each costs more than it does in
        the file.
        """
        self._items_left -= count
        if self._items_left < 0:
            raise FormatError("arrays are too long", where=self.location(), got=count, limit=_MAX_ARRAY_ITEMS)

    def scalar(self, form: struct.Struct) -> int:
        """One number (the type is int for the callers' sake; float forms give floats)."""
        self.need(form.size, "a number")
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value  # type: ignore[no-any-return]

    def string(self, what: str, max_bytes: int) -> str:
        """u64 length and UTF-8 bytes."""
        length = self.scalar(_U64)
        self.need(length, what)
        if length > max_bytes:
            raise FormatError(
                f"{what} is too long", where=self.location(), got=f"{length} bytes", limit=max_bytes
            )
        start = self.position
        self.position += length
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{what} is not UTF-8", where=self.location(), got=f"at {start}") from error

    def strings(self, count: int) -> list[str]:
        """``count`` strings: the loop that a vocabulary's 300,000 strings run through, hence written out."""
        data, end, position, unpack = self.data, self._end, self.position, _U64.unpack_from
        result = []
        try:
            for _ in range(count):
                stop = position + 8 + unpack(data, position)[0]
                if stop > end:
                    break
                result.append(str(data[position + 8 : stop], "utf-8"))
                position = stop
        except UnicodeDecodeError as error:
            raise FormatError("string is not UTF-8", where=self.location(), got=f"at {position}") from error
        except struct.error:
            pass  # the length itself lies beyond the end; reported below with the rest
        self.position = position
        if len(result) != count:
            raise FormatError(
                "array of strings exceeds the header",
                where=self.location(),
                got=f"string {len(result)} of {count} at {position}",
                limit=f"{end - position} bytes left",
                hint="the download may be incomplete, or the file is damaged",
            )
        return result


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    where = cursor.where
    cursor.need(24, "the header")
    if cursor.data[:4] != MAGIC:
        raise FormatError(
            "not a GGUF file", where=where, got=f"magic {bytes(cursor.data[:4])!r}", limit=f"{MAGIC!r}"
        )
    cursor.position = 4
    version = cursor.scalar(_U32)
    if version & 0xFFFF == 0 and version:
        raise FormatError(
            "GGUF file is big-endian",
            where=where,
            got=f"version {version:#x}",
            hint="convert it with gguf-convert-endian",
        )
    if version not in VERSIONS:
        raise FormatError(
            "GGUF version is not supported",
            where=where,
            got=version,
            limit=VERSIONS,
            hint="get a current GGUF of the model",
        )
    num_tensors, num_pairs = cursor.scalar(_U64), cursor.scalar(_U64)
    left = len(cursor.data) - cursor.position
    for what, count, bound, least in (
        ("tensors", num_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES),
        ("metadata pairs", num_pairs, _MAX_PAIRS, _MIN_PAIR_BYTES),
    ):
        limit = min(bound, left // least)
        if count > limit:
            raise FormatError(f"more {what} than the file can hold", where=where, got=count, limit=limit)
    return num_tensors, num_pairs


def _read_value(cursor: _Cursor, kind: int, depth: int) -> GgufValue:
    form = _SCALARS.get(kind)
    if form is not None:
        return cursor.scalar(form)
    if kind == _STRING:
        return cursor.string("string", _MAX_STRING_BYTES)
    if kind == _BOOL:
        value = cursor.scalar(_SCALARS[0])
        if value > 1:
            raise FormatError("boolean is neither 0 nor 1", where=cursor.location(), got=value)
        return bool(value)
    if kind == _ARRAY:
        return _read_array(cursor, depth + 1)
    raise FormatError("unknown type of metadata", where=cursor.location(), got=kind, limit="0..12")


def _read_array(cursor: _Cursor, depth: int) -> GgufValue:
    if depth > _MAX_ARRAY_DEPTH:
        raise FormatError(
            "arrays are nested too deeply", where=cursor.location(), got=depth, limit=_MAX_ARRAY_DEPTH
        )
    kind, count = cursor.scalar(_U32), cursor.scalar(_U64)
    form = _SCALARS[0] if kind == _BOOL else _SCALARS.get(kind)
    # Strings have at least a length each, arrays a type and a length.
    cursor.need(count * (form.size if form else 8 if kind == _STRING else 12), "array")
    cursor.count_items(count)
    if form is not None:
        numbers = list(struct.unpack_from(f"<{count}{form.format[1:]}", cursor.data, cursor.position))
        cursor.position += count * form.size
        if kind == _BOOL:
            if any(number > 1 for number in numbers):
                raise FormatError("boolean is neither 0 nor 1", where=cursor.location())
            return [bool(number) for number in numbers]
        return numbers
    if kind == _STRING:
        return list(cursor.strings(count))
    return [_read_value(cursor, kind, depth) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class _Record:
    """A tensor's record as the file has it; offset counts from the start of the data."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    offset: int


def _read_record(cursor: _Cursor) -> _Record:
    name = check_tensor_name(cursor.string("tensor name", _MAX_KEY_BYTES), cursor.where)
    cursor.what = name
    rank = cursor.scalar(_U32)
    if not 1 <= rank <= _MAX_RANK:
        raise FormatError(
            "tensor has an impossible rank", where=cursor.location(), got=rank, limit=f"1..{_MAX_RANK}"
        )
    sizes = [cursor.scalar(_U64) for _ in range(rank)]
    if not all(1 <= size <= _MAX_DIMENSION for size in sizes):
        raise FormatError(
            "tensor has an impossible size", where=cursor.location(), got=sizes, limit=f"1..{_MAX_DIMENSION}"
        )
    number = cursor.scalar(_U32)
    if number not in TYPE_NAMES:
        what, hint = explain_type(number)
        raise FormatError(what, where=cursor.location(), got=f"type number {number}", hint=hint)
    offset = cursor.scalar(_U64)
    cursor.what = ""
    return _Record(name, TYPE_NAMES[number], tuple(reversed(sizes)), offset)


def _alignment(metadata: dict[str, GgufValue], where: str) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            "alignment is not a power of two",
            where=f"{where}: general.alignment",
            got=shown(value),
            limit=f"powers of two up to {_MAX_ALIGNMENT}",
        )
    return value


def _place_tensors(
    records: list[_Record], data_start: int, alignment: int, file_bytes: int, where: str
) -> dict[str, GgufTensor]:
    """Absolute offsets, checked: aligned, apart from each other, inside the file."""
    tensors: dict[str, GgufTensor] = {}
    for record in records:
        location = f"{where}: {shown(record.name)}"
        if record.name in tensors:
            raise FormatError("tensor occurs twice", where=location)
        if record.offset % alignment:
            raise FormatError(
                "tensor is not aligned",
                where=location,
                got=f"offset {record.offset}",
                limit=f"multiples of {alignment}",
            )
        num_bytes = tensor_bytes(record.ggml_type, record.shape, location)
        offset = checked_add([data_start, record.offset], location)
        tensors[record.name] = GgufTensor(record.name, record.ggml_type, record.shape, offset, num_bytes)
    previous = None
    needed = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes):
        if tensor.offset_bytes < needed:
            raise FormatError(
                "tensors overlap",
                where=f"{where}: {shown(tensor.name)}",
                got=f"offset {tensor.offset_bytes}",
                limit=f"{shown(previous)} ends at {needed}",
            )
        needed = checked_add([tensor.offset_bytes, tensor.num_bytes], where)
        previous = tensor.name
    if tensors and needed > file_bytes:
        raise FormatError(
            f"file ends at {file_bytes}, its header needs {needed}",
            where=f"{where}: {shown(previous)}",
            got=f"{file_bytes} bytes",
            limit=f"{needed} bytes",
            hint="the download may be incomplete",
        )
    return tensors
