"""What an operator does with a slot: saves it to a file, fills it from one, empties it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.names import shown
from krasis.runtime.serving.api import SlotFile
from krasis.runtime.serving.ids import Ids
from krasis.runtime.serving.prefix_folder import rows_of
from krasis.runtime.serving.prefix_store import Layers
from krasis.runtime.serving.slot_work import SlotWork
from krasis.runtime.serving.slots import Slot
from krasis.runtime.state.kv_file import PrefixFile, save_prefix

T = TypeVar("T")


class _Backend(Protocol):
    description: str
    kv_dtype: str
    capacity: int


class _Turns(Protocol):
    def in_turn(self, work: Callable[[], T]) -> Future[T]:
        """Does work in the core's thread, between batches."""
        ...


class SlotActions:
    """Acts on a core's slots, by their places in ``CoreStatus.slots``. Any thread may call; each method gives
    a future. A slot in which somebody works is refused (UsageError).

    folder: of the files; None = there are none. A file has no other place than in it.
    """

    def __init__(
        self,
        turns: _Turns,
        slots: Sequence[Slot],
        work: SlotWork,
        bundle: Bundle,
        backend: _Backend,
        folder: Path | None,
    ) -> None:
        self._turns, self._slots, self._work = turns, slots, work
        self._bundle, self._backend, self.folder = bundle, backend, folder

    def save(self, number: int, name: str) -> Future[SlotFile]:
        """Writes what the slot holds. An older saved prefix of that name is replaced, nothing else is."""
        return self._turns.in_turn(partial(self._save, number, self._path(name)))

    def restore(self, number: int, name: str) -> Future[SlotFile]:
        """Fills the slot. What it held is offered to the prefix store. The next prompt that begins with these
        tokens goes on from them, in this slot or in another."""
        return self._turns.in_turn(partial(self._restore, number, self._path(name)))

    def erase(self, number: int) -> Future[int]:
        """Empties the slot; gives how many tokens it held."""
        return self._turns.in_turn(partial(self._erase, number))

    def _save(self, number: int, path: Path) -> SlotFile:
        slot = self._idle(number)
        if not slot.length:
            raise UsageError("the slot is empty; there is nothing to save", where=f"slot {number}")
        held = slot.held
        rows = rows_of(self._backend, self._work.export_of(slot))
        save_prefix(path, self._bundle, rows.backend, held.tolist())
        return SlotFile(len(held), path.stat().st_size)

    def _restore(self, number: int, path: Path) -> SlotFile:
        slot = self._idle(number)
        if not path.is_file():
            raise UsageError("there is no such file among the saved slots", got=shown(path.name))
        rows = rows_of(self._backend)
        with PrefixFile(path) as file:
            file.check(self._bundle, rows.backend)
            file.verify()
            tokens = file.tokens(self._bundle.spec)
            file.restore(rows.backend)
        layers: Layers = rows.layers
        self._work.refill(slot, self._slots, Ids(np.asarray(tokens, np.int64)), layers)
        return SlotFile(len(tokens), path.stat().st_size)

    def _erase(self, number: int) -> int:
        slot = self._idle(number)
        length = slot.length
        self._work.empty(slot)
        return length

    def _idle(self, number: int) -> Slot:
        if not 0 <= number < len(self._slots):
            raise UsageError("there is no such slot", got=number, limit=f"0 to {len(self._slots) - 1}")
        slot = self._slots[number]
        if not slot.is_idle:
            raise UsageError("somebody works in this slot", got=number, hint="ask again when it is idle")
        return slot

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise UsageError(
                "the server has no folder for saved slots", hint="start it with --slot-save-path"
            )
        if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
            raise UsageError("a saved slot is named by a plain file name", got=shown(name))
        return self.folder / name
