"""What a pass over T rows writes, made once for the most rows: a buffer serves every block that names it."""

from __future__ import annotations

import numpy as np

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.native_arrays import Array, aligned_empty

_DTYPES: dict[str, type[np.generic]] = {"ids": np.int32, "chosen": np.int32}
_MAX_VIEWS = 64


class Buffers:
    """Buffers by name and number of columns, and views of their first rows, the same object when asked again.

    Blocks reserve what they need before anything is computed; ``make`` takes the memory. Several blocks that
    reserve a name share it, as wide as the widest: nothing in it outlives a block but ``chosen``.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._columns: dict[str, int] = {}
        self._acts_columns: set[int] = set()
        self._flat: dict[str, Array] = {}
        self._acts: dict[int, Acts] = {}
        self._views: dict[tuple[str, int, int], Array] = {}

    def reserve(self, name: str, columns: int) -> None:
        """Room for [max_rows, columns] under a name (f32, ``ids`` and ``chosen`` int32)."""
        self._columns[name] = max(columns, self._columns.get(name, 0))

    def reserve_acts(self, columns: int) -> None:
        """Room for int8 activations of so many columns."""
        self._acts_columns.add(columns)

    def make(self) -> None:
        """Takes the memory of all that was reserved."""
        for name, columns in self._columns.items():
            self._flat[name] = aligned_empty((self.max_rows * columns,), _DTYPES.get(name, np.float32))
        self._acts = {columns: Acts.allocate(self.max_rows, columns) for columns in self._acts_columns}

    def rows(self, name: str, num_rows: int, columns: int) -> Array:
        """[num_rows, columns] at the beginning of a buffer."""
        key = (name, num_rows, columns)
        found = self._views.get(key)
        if found is None:
            if num_rows > self.max_rows or columns > self._columns.get(name, 0):
                raise NativeError("no such buffer was reserved", where=name, got=(num_rows, columns))
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._flat[name][: num_rows * columns].reshape(num_rows, columns)
            self._views[key] = found
        return found

    def rows_if_any(self, name: str, num_rows: int) -> Array | None:
        """The whole rows of a buffer; None if no block reserved it."""
        columns = self._columns.get(name)
        return None if columns is None else self.rows(name, num_rows, columns)

    def acts(self, num_rows: int, columns: int) -> Acts:
        """int8 activations [num_rows, columns]."""
        return self._acts[columns].view(num_rows)
