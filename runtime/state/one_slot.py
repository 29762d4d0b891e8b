"""The state of a backend that keeps one sequence, as a store with one slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.batch import Batch, Span, StateRows

Export = Callable[[int, int], tuple[StateRows, StateRows]]
Import = Callable[[int, StateRows, StateRows], None]


class OneSlot:
    """See ``batch.StateStore``. export: (layer, num_tokens) -> keys, values; import_rows: (layer, keys,
    values).
    """

    num_slots = 1

    def __init__(self, capacity: int, dtype: str, export: Export, import_rows: Import) -> None:
        self.capacity, self.dtype = capacity, dtype
        self._export, self._import = export, import_rows
        self._length, self._is_open = 0, False

    def open(self) -> int:
        """See ``StateStore``."""
        if self._is_open:
            raise ResourceError("every slot is taken", got=1, hint="this backend keeps one sequence")
        self._is_open, self._length = True, 0
        return 0

    def close(self, slot: int) -> None:
        """See ``StateStore``."""
        self._check(slot)
        self._is_open = False

    def length(self, slot: int) -> int:
        """See ``StateStore``."""
        self._check(slot)
        return self._length

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``."""
        self._check(slot)
        return min(position, self._length)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``."""
        self._check(slot)
        if not 0 <= position <= self._length:
            raise NativeError("no such position is held", where="rewind", got=position, limit=self._length)
        self._length = position

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``: nothing to do."""
        self._check(slot)

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``."""
        self._check(slot)
        return self._export(layer, num_tokens)

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``."""
        self._check(slot)
        self._import(layer, keys, values)
        self._length = keys.shape[1]

    # ---- for the backend ---------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """What lies beyond the spans' starts is no longer held. Raises NativeError unless every span begins
        where its slot has been computed, and ends in it."""
        for span in batch.spans:
            self._check(span.slot)
            if span.start > self._length or span.end > self.capacity:
                raise NativeError(
                    "positions are not computed in order, or lie beyond the slot",
                    where="batch",
                    got=f"{span.start}..{span.end}",
                    limit=f"{self._length}, {self.capacity}",
                )
            self._length = span.start

    def advance(self, spans: Sequence[Span]) -> None:
        """The spans were computed: their slots end where they do."""
        for span in spans:
            self._length = span.end

    def _check(self, slot: int) -> None:
        if slot != 0 or not self._is_open:
            raise NativeError("the slot is not open", where="state", got=slot, limit="0")
