"""Which rows of a call belong to which sequence, in memory that native calls read: see ``krasis_span``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Span
from krasis.runtime.cpu.native import SpanStruct
from krasis.runtime.cpu.native_arrays import Array, out_pointer

ELEMENT_BYTES: dict[str, int] = {"f32": 4, "f16": 2, "int8": 1}
_SCALE_BYTES = 4


class SlotMemory:
    """The keys and values of one sequence, of all layers: writable C-contiguous arrays of any type."""

    __slots__ = ("keys", "keys_address", "values", "values_address")

    def __init__(self, keys: Array, values: Array) -> None:
        self.keys, self.values = keys, values
        self.keys_address = out_pointer(keys, keys.shape, keys.dtype, "slot.keys")
        self.values_address = out_pointer(values, values.shape, values.dtype, "slot.values")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Where a layer's keys and values lie in a slot's memory, [num_kv_heads, capacity, head_dim] of dtype.
    is_ring: position p lies at p % capacity.
    """

    keys_offset_bytes: int
    values_offset_bytes: int
    capacity: int
    dtype: str  # f32, f16 or int8
    is_ring: bool = False

    def size_bytes(self, num_kv_heads: int, head_dim: int, num_parts: int = 1) -> int:
        """Of the layer's keys, and of its values. num_parts: scales of a row in 8 bits. Raises NativeError
        for a type that kernels lack."""
        if self.dtype not in ELEMENT_BYTES:
            raise NativeError("cache must be f32, f16 or int8", where="cache", got=self.dtype)
        row_bytes = head_dim * ELEMENT_BYTES[self.dtype]
        if self.dtype == "int8":
            row_bytes += num_parts * _SCALE_BYTES
        return num_kv_heads * self.capacity * row_bytes


class Spans:
    """Up to max_spans spans. A call that was given the object reads what ``set`` wrote last.

    keys_bytes, values_bytes: every slot's memory has so many at least, which is what calls are checked by.
    """

    __slots__ = ("_array", "_records", "_slots", "address", "keys_bytes", "max_spans", "values_bytes")

    def __init__(self, max_spans: int, keys_bytes: int, values_bytes: int) -> None:
        if max_spans < 1:
            raise NativeError("too few spans", where="spans", got=max_spans, limit=">= 1")
        self.max_spans, self.keys_bytes, self.values_bytes = max_spans, keys_bytes, values_bytes
        self._array = (SpanStruct * max_spans)()
        self._records = list(self._array)
        self._slots: list[SlotMemory] = []
        self.address = ctypes.addressof(self._array)

    def set(self, spans: Sequence[Span], slots: Mapping[int, SlotMemory] | Sequence[SlotMemory]) -> None:
        """spans: rows and positions, in the order of the rows; slots: the memory of each slot number.

        Raises NativeError, and changes nothing, for spans that overlap or leave rows out, and for memory that
        is too small or used twice.
        """
        memories = [slots[span.slot] for span in spans]
        if memories != self._slots or not memories:  # else only positions differ, as from token to token
            self._check_memories(spans, memories)
        row = 0
        for span in spans:
            if span.first_row != row or span.rows < 1 or span.start < 0:
                raise NativeError("spans do not cover the rows in order", where="spans", got=span, limit=row)
            row += span.rows
        for record, span in zip(self._records, spans, strict=False):
            record.first_row, record.rows, record.start = span.first_row, span.rows, span.start
        if memories != self._slots:
            self._point_to(memories)

    def check_cache(
        self, cache: LayerCache, num_kv_heads: int, head_dim: int, where: str, has_values: bool = True
    ) -> None:
        """Raises NativeError if a layer's keys, or values as large, end outside of the slots' memory."""
        sides = [("keys", cache.keys_offset_bytes, self.keys_bytes)]
        if has_values:
            sides.append(("values", cache.values_offset_bytes, self.values_bytes))
        size_bytes = cache.size_bytes(num_kv_heads, head_dim, 1 if has_values else 2)
        for name, begin, limit in sides:
            if begin < 0 or size_bytes < 0 or begin + size_bytes > limit:
                raise NativeError(
                    f"the layer's {name} end outside of the slot's memory",
                    where=f"{where}.cache",
                    got=f"{begin} + {size_bytes} bytes",
                    limit=f"{limit} bytes",
                )

    def _point_to(self, memories: list[SlotMemory]) -> None:
        for record, memory in zip(self._records, memories, strict=False):
            record.keys, record.values = memory.keys_address, memory.values_address
        for record in self._records[len(memories) :]:
            record.rows = 0
        self._slots = memories

    def _check_memories(self, spans: Sequence[Span], memories: Sequence[SlotMemory]) -> None:
        if not 1 <= len(spans) <= self.max_spans:
            raise NativeError("too many or no spans", where="spans", got=len(spans), limit=self.max_spans)
        for span, memory in zip(spans, memories, strict=True):
            if memory.keys.nbytes < self.keys_bytes or memory.values.nbytes < self.values_bytes:
                raise NativeError(
                    "a slot's memory is too small",
                    where=f"slot {span.slot}",
                    got=f"{memory.keys.nbytes} and {memory.values.nbytes} bytes",
                    limit=f"{self.keys_bytes} and {self.values_bytes} bytes",
                )
        if len({memory.keys_address for memory in memories}) < len(memories):
            raise NativeError("a slot has two spans", where="spans", got=[span.slot for span in spans])


@dataclass(frozen=True, slots=True)
class Round:
    """Consecutive rows of a pass, begin..end-1, and whose they are."""

    begin: int
    end: int
    spans: Spans


class Rounds:
    """The rows of a pass, cut so that no sequence has more than some number of rows in a part."""

    def __init__(self, whole: Spans, spans: Sequence[Span], slots: Mapping[int, SlotMemory]) -> None:
        self._whole, self._spans, self._slots = whole, spans, slots
        self._cut: dict[int, tuple[Round, ...]] = {}

    def of(self, most_rows: int) -> tuple[Round, ...]:
        """The parts, in order."""
        found = self._cut.get(most_rows)
        if found is None:
            found = self._cut[most_rows] = tuple(self._rounds(most_rows))
        return found

    def _rounds(self, most_rows: int) -> Iterator[Round]:
        if all(span.rows <= most_rows for span in self._spans):
            yield Round(0, self._spans[-1].end_row, self._whole)
            return
        begin = 0
        for parts in cut_spans(self._spans, most_rows):
            spans = Spans(len(parts), self._whole.keys_bytes, self._whole.values_bytes)
            spans.set(parts, self._slots)
            yield Round(begin, begin + parts[-1].end_row, spans)
            begin += parts[-1].end_row


class RowByRow:
    """The rows of one sequence, as a whole and one by one: as ``Rounds`` for calls that are kept, which read
    what ``set`` wrote last.
    """

    def __init__(self, num_rows: int, keys_bytes: int, values_bytes: int) -> None:
        self.whole = Spans(1, keys_bytes, values_bytes)
        self._num = num_rows
        self._single = [Spans(1, keys_bytes, values_bytes) for _ in range(num_rows)]

    def of(self, most_rows: int) -> tuple[Round, ...]:
        """The parts, in order."""
        if self._num <= most_rows:
            return (Round(0, self._num, self.whole),)
        return tuple(Round(row, row + 1, spans) for row, spans in enumerate(self._single))

    def set(self, span: Span, slots: Mapping[int, SlotMemory]) -> None:
        """Where the rows are. Raises as ``Spans.set``."""
        self.whole.set((span,), slots)
        for row, spans in enumerate(self._single):
            spans.set((Span(span.slot, 0, 1, span.start + row),), slots)


def cut_spans(spans: Sequence[Span], most_rows: int) -> list[list[Span]]:
    """Spans in parts of consecutive rows, counted from 0 in each, of which no sequence has more than
    most_rows."""
    found: list[list[Span]] = [[]]
    row = 0
    for span in spans:
        for begin in range(0, span.rows, most_rows):
            if begin:
                found.append([])
                row = 0
            rows = min(most_rows, span.rows - begin)
            found[-1].append(Span(span.slot, row, rows, span.start + begin, span.logits))
            row += rows
    return found
