"""What the GPU runtime asks of the host memory of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from krasis.runtime.device.api import Event
from krasis.runtime.planning.types import StoreMethod

Method = StoreMethod
METHODS: tuple[Method, ...] = ("in-place", "arena", "ring")
ExpertRange = tuple[int, int, int]  # layer, first expert (of the whole layer), number of experts

MAX_REGISTERED_BYTES = 2**28
"""Most bytes of one registration. Longer ones show no progress, fail as a whole, and hold locks of the kernel
and of the driver for longer, which whoever opens the rest has to wait for.
"""


ASSUMED_GBPS = 20.0  # of pinning, before any is done


@dataclass(frozen=True, slots=True, eq=False)
class PinnedExperts:
    """Experts [first, first + count) of a layer in pinned host memory. Copy from ``parts``, in their order.

    parts: uint8 [.., record_bytes], together [count, record_bytes]; each lies inside one registration, which
    CUDA demands of the source of a copy. Read only: the bytes may be those of the bundle's files.
    """

    layer: int
    first: int
    count: int
    parts: tuple[torch.Tensor, ...]
    slot: int = -1

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [count, record_bytes]; with several parts a copy of them in ordinary memory."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A method that was considered and what came of it."""

    method: Method
    taken: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Which store was taken, why, and the figures that decided (bytes). attempts: in the order of trying."""

    method: Method
    reason: str
    attempts: tuple[Attempt, ...]
    figures: dict[str, int | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How loading went so far. seconds: from opening to now, or to the end once ``finished``.

    direct_bytes: read past the page cache; cached_bytes: copied from it; in_place_bytes: pinned where they
    lie. register_s: in calls that pin, summed over threads. threads: that load.
    """

    num_bytes: int
    total_bytes: int
    seconds: float
    gbps: float
    direct_bytes: int
    cached_bytes: int
    in_place_bytes: int
    register_s: float
    threads: int
    finished: bool

    @property
    def remaining_s(self) -> float:
        """Seconds until everything is there, at the rate so far (at first: at one that is often met)."""
        if self.finished:
            return 0.0
        return (self.total_bytes - self.num_bytes) / (self.gbps or ASSUMED_GBPS) / 1e9


class ExpertStore(Protocol):
    """A rank's GPU experts in host memory. Used by one thread; loads in others.

    record_bytes: of one expert. choice: how it was chosen.
    first_expert, num_experts: of each layer, what this rank holds.
    """

    record_bytes: int
    first_expert: int
    num_experts: int
    choice: Choice

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that the store holds pinned."""
        ...

    @property
    def method(self) -> Method:
        """The kind of memory in which the experts lie."""
        ...

    @property
    def reason(self) -> str:
        """The reason why this kind was taken."""
        ...

    def load_progress(self) -> tuple[int, int]:
        """(bytes ready, bytes in all) of what is loaded once; (0, 0) for a ring."""
        ...

    @property
    def is_loading(self) -> bool:
        """Whether loading goes on: neither done, nor ended by an error or by ``close``."""
        ...

    def load_report(self) -> LoadReport:
        """How loading went."""
        ...

    def wait_loaded(self) -> None:
        """Blocks until all is loaded (a ring: at once). Raises what ``acquire`` would."""
        ...

    def expect(self, groups: Sequence[ExpertRange]) -> None:
        """The order in which groups of the next pass will be asked for. A ring reads ahead by it; others
        ignore it.

        Raises UsageError for a group outside the store, ResourceError if a ring cannot hold two of the
        largest.
        """
        ...

    def acquire(self, layer: int, first: int, count: int) -> PinnedExperts:
        """The experts' bytes, once they are there.

        Raises UsageError for a group outside the store or after ``close``, FormatError if the file is shorter
        than the manifest says, ResourceError if reading or registering failed.
        """
        ...

    def release(self, piece: PinnedExperts, event: Event) -> None:
        """Gives a piece back: its memory may be overwritten once the event is done."""
        ...

    def close(self) -> None:
        """Stops loading, unregisters, frees. Copies from it must be done. Calling it again does nothing."""
        ...
