"""Frozen records that check themselves: typed, bounded fields, and a JSON form that reads back strictly.

A field says its type by its annotation and its bounds by ``size`` or ``number``. JSON leaves out fields that
have their default, so that a field added for a new family changes no manifest of an old one; a default
therefore never changes its meaning.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self

from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.limits import MAX_JSON_DEPTH
from krasis.formats.names import shown

MAX_LAYERS = 10_000
MAX_HIDDEN = 1 << 20
MAX_HEADS = 1 << 16
MAX_HEAD_DIM = 1 << 12
MAX_EXPERTS = 1 << 16
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 31
_MAX_TEXT = 100
_MAX_ITEMS = MAX_LAYERS


def size(limit: int = MAX_HIDDEN, least: int = 1, default: Any = MISSING) -> Any:
    """A field that counts something, from ``least`` to ``limit``."""
    return field(default=default, metadata={"range": (least, limit)})


def number(low: float, high: float, default: Any = MISSING) -> Any:
    """A field that is a finite number from ``low`` to ``high``."""
    return field(default=default, metadata={"range": (low, high)})


def required() -> Any:
    """A field of another type that must be given."""
    return field()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts ``where`` in front of the place that an error from inside names, unless it is there."""
    try:
        yield
    except KrasisError as error:
        if error.where.startswith(where):
            raise
        place = f"{where}: {error.where}" if error.where else where
        raise type(error)(
            error.what, where=place, got=error.got, limit=error.limit, hint=error.hint
        ) from error


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field may hold. types: those of its union. item: of a tuple's entries."""

    name: str
    types: tuple[Any, ...]
    item: Any
    choices: tuple[Any, ...]
    bounds: tuple[float, float] | None
    default: Any

    @property
    def records(self) -> tuple[type[Record], ...]:
        """The record types among those it may hold."""
        return tuple(kind for kind in self.types if isinstance(kind, type) and issubclass(kind, Record))


def _field_of(name: str, hint: Any, bounds: tuple[float, float] | None, default: Any) -> _Field:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    flat: list[Any] = []
    item: Any = None
    choices: list[Any] = []
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            item = _field_of(f"{name}[]", typing.get_args(kind)[0], bounds, MISSING)
            flat.append(tuple)
        elif typing.get_origin(kind) is typing.Literal:
            choices += typing.get_args(kind)
            flat.append(str)
        else:
            flat.append(kind)
    return _Field(name, tuple(flat), item, tuple(choices), bounds, default)


_FIELDS: dict[type[Any], tuple[_Field, ...]] = {}


def _fields_of(cls: type[Any]) -> tuple[_Field, ...]:
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls)
        _FIELDS[cls] = tuple(
            _field_of(entry.name, hints[entry.name], entry.metadata.get("range"), entry.default)
            for entry in fields(cls)
        )
    return _FIELDS[cls]


class Record:
    """Base of the records: each field is checked when one is made; ``check`` may compare fields."""

    __slots__ = ()
    KIND: ClassVar[str] = ""  # its name where a field may hold records of several types

    def __post_init__(self) -> None:
        for entry in _fields_of(type(self)):
            _check_value(getattr(self, entry.name), entry, f"{type(self).__name__}.{entry.name}")
        self.check()

    def check(self) -> None:
        """Raises FormatError for fields that contradict each other."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types without the fields that have their default; ``from_json`` inverts it."""
        return {
            entry.name: _to_json(getattr(self, entry.name), entry)
            for entry in _fields_of(type(self))
            if entry.default is MISSING or getattr(self, entry.name) != entry.default
        }

    @classmethod
    def from_json(cls, record: object, where: str) -> Self:
        """Reads ``to_json``'s form. Unknown, missing or ill-typed fields and impossible values raise
        FormatError.
        """
        read: Self = read_record(cls, record, where)
        return read


def fail(what: str, record: Record, name: str, got: object, limit: object) -> FormatError:
    """An error about one field of a record."""
    return FormatError(what, where=f"{type(record).__name__}.{name}", got=got, limit=limit)


# ---- checks ------------------------------------------------------------------------------------------------


def _check_value(value: Any, entry: _Field, where: str) -> None:
    if type(value) not in entry.types:
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in entry.types)
        raise FormatError("field has the wrong type", where=where, got=shown(value), limit=names)
    if isinstance(value, str):
        _check_text(value, entry, where)
    elif isinstance(value, tuple):
        if len(value) > _MAX_ITEMS:
            raise FormatError("list is too long", where=where, got=len(value), limit=_MAX_ITEMS)
        for part in value:
            _check_value(part, entry.item, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(value, entry, where)


def _check_text(value: str, entry: _Field, where: str) -> None:
    if entry.choices and value not in entry.choices:
        raise FormatError("unknown choice", where=where, got=shown(value), limit=", ".join(entry.choices))
    if len(value) > _MAX_TEXT:
        raise FormatError("text is too long", where=where, got=shown(value), limit=f"{_MAX_TEXT} characters")


def _check_number(value: float, entry: _Field, where: str) -> None:
    low, high = entry.bounds or ((1, MAX_HIDDEN) if isinstance(value, int) else (-1e15, 1e15))
    if not (low <= value <= high) or not math.isfinite(value):
        what = "size is out of range" if isinstance(value, int) else "number is out of range"
        raise FormatError(what, where=where, got=shown_number(value), limit=f"{low}..{high}")


def shown_number(value: float) -> str:
    """A number for a message; a huge one by its length."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return str(value)


# ---- JSON --------------------------------------------------------------------------------------------------


def _to_json(value: Any, entry: _Field) -> Any:
    if isinstance(value, Record):
        tag = {"kind": value.KIND} if len(entry.records) > 1 else {}
        return tag | value.to_json()
    if isinstance(value, tuple):
        return [_to_json(part, entry.item) for part in value]
    return value


def read_record(cls: type[Any], record: object, where: str, depth: int = 0) -> Any:
    """A record of ``cls`` out of JSON. Values that are records or tuples already stay. Raises FormatError."""
    if not isinstance(record, Mapping):
        raise FormatError("field must be an object", where=where, got=shown(record))
    if depth > MAX_JSON_DEPTH:
        raise FormatError("nested too deeply", where=where, limit=f"{MAX_JSON_DEPTH} levels")
    entries = {entry.name: entry for entry in _fields_of(cls)}
    unknown = [key for key in record if key not in entries]
    if unknown:
        raise FormatError("unknown field", where=where, got=shown(unknown[0]), limit=", ".join(entries))
    missing = [name for name, entry in entries.items() if name not in record and entry.default is MISSING]
    if missing:
        raise FormatError("field is missing", where=where, got=missing[0])
    values = {
        key: _from_json(value, entries[key], f"{where}.{key}", depth + 1) for key, value in record.items()
    }
    with located(where):
        return cls(**values)


def _from_json(value: Any, entry: _Field, where: str, depth: int) -> Any:
    if isinstance(value, Mapping) and entry.records:
        return read_record(*_untagged(value, entry, where), where, depth)
    if isinstance(value, list) and tuple in entry.types:
        if len(value) > _MAX_ITEMS:
            raise FormatError("list is too long", where=where, got=len(value), limit=_MAX_ITEMS)
        return tuple(_from_json(part, entry.item, where, depth) for part in value)
    if type(value) is int and float in entry.types and int not in entry.types:
        return float(value) if value.bit_length() < 64 else math.inf  # refused by its range
    return value


def _untagged(value: Mapping[str, Any], entry: _Field, where: str) -> tuple[type[Record], Mapping[str, Any]]:
    """The record type that an object is of, and the object without the name of it."""
    if len(entry.records) == 1:
        return entry.records[0], value
    by_kind = {kind.KIND: kind for kind in entry.records}
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in by_kind:
        raise FormatError("unknown kind", where=f"{where}.kind", got=shown(kind), limit=", ".join(by_kind))
    return by_kind[kind], {key: part for key, part in value.items() if key != "kind"}
