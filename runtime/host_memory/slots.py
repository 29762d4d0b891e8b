"""The slots of a ring: pinned memory for one group of experts each, and what is in it."""

from __future__ import annotations

import enum
import logging

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import KrasisError
from krasis.runtime.device.api import Event
from krasis.runtime.host_memory.api import MAX_REGISTERED_BYTES, ExpertRange
from krasis.runtime.host_memory.memory import anonymous, tensor_of
from krasis.runtime.host_memory.registrar import Registrar

Bytes = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)


class State(enum.Enum):
    """FREE: nothing in it, or what is no longer wanted. FILLING: being read into. FULL: ready, nobody has it.
    HELD: given out. DRAINING: given back, but the event may not be done.
    """

    FREE = enum.auto()
    FILLING = enum.auto()
    FULL = enum.auto()
    HELD = enum.auto()
    DRAINING = enum.auto()


class Slot:
    """Pinned rows, uint8 [num_rows, record_bytes], and what is in them. Raises ResourceError if refused."""

    __slots__ = (
        "_registered",
        "_registrar",
        "event",
        "group",
        "is_wanted",
        "order",
        "parts",
        "rows",
        "state",
        "tensor",
    )

    def __init__(self, num_rows: int, record_bytes: int, registrar: Registrar) -> None:
        self.rows = anonymous(num_rows * record_bytes, where="slot of a ring").reshape(num_rows, record_bytes)
        self.tensor = tensor_of(self.rows)
        self.state, self.group, self.order = State.FREE, (-1, 0, 0), 0
        self.event: Event | None = None
        self.is_wanted = True
        self._registrar = registrar
        self._registered: list[torch.Tensor] = []
        step = max(1, MAX_REGISTERED_BYTES // record_bytes)
        self.parts = tuple(self.tensor[first : first + step] for first in range(0, num_rows, step))
        try:
            for part in self.parts:
                registrar.register(part.view(-1), read_only=False)
                self._registered.append(part)
        except KrasisError:
            self.free()
            raise

    def take(self, group: ExpertRange, order: int) -> None:
        """Marks it as being filled with a group. order: in which groups will be asked for, for eviction."""
        self.state, self.group, self.order = State.FILLING, group, order
        self.event, self.is_wanted = None, True

    def parts_of(self, count: int) -> tuple[torch.Tensor, ...]:
        """The first count rows, cut where registrations end."""
        found, left = [], count
        for part in self.parts:
            if left > 0:
                found.append(part[:left])
                left -= part.shape[0]
        return tuple(found)

    def free(self) -> None:
        """Unpins and lets go of the memory."""
        for part in self._registered:
            try:
                self._registrar.unregister(part.view(-1))
            except KrasisError as error:
                logger.warning("ring: %s", error)
        self._registered = []
        self.parts = ()
        self.tensor = self.tensor[:0].clone()
        self.rows = self.rows[:0].copy()
