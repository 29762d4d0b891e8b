"""The clocks of the double's host and flags, and the check of every access against them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from krasis.formats.errors import UsageError
from krasis.runtime.device.double_memory import Allocation
from krasis.runtime.device.double_schedule import Operation, Touched
from krasis.runtime.device.ordering import HOST, Access, Clock, Conflict, OrderingError, join

_log = logging.getLogger(__name__)
_FLAG_BYTES = 8


@dataclass(slots=True)
class _Flag:
    """What is known to whoever sees a flag that the device set, or that the host set."""

    device: Clock = field(default_factory=dict)
    host: Clock = field(default_factory=dict)
    num_releases: int = 0
    num_acquired: int = 0


class Checks:
    """What the host knows to be over, what flags say, and the errors that follow.

    gave_up: a launch stopped waiting for a flag that the host never set; what runs behind it is not checked.
    """

    def __init__(self) -> None:
        self.gave_up = False
        self._host: Clock = {HOST: 0}
        self._flags: dict[int, _Flag] = {}

    def known_to_host(self) -> Clock:
        """A copy of the host's clock."""
        return dict(self._host)

    def host_knows(self, clocks: Iterable[Clock]) -> None:
        """The host waited for something."""
        for clock in clocks:
            join(self._host, clock)

    def host_access(self, label: str) -> Access:
        """The host's next access."""
        self._host[HOST] += 1
        return Access(HOST, self._host[HOST], label)

    def host_touches(self, touched: Sequence[Touched], writes: bool) -> None:
        """Notes the host's accesses. Raises OrderingError for one that is too early."""
        for allocation, _ in touched:
            if allocation.kind == "device":
                raise UsageError("the host cannot touch device memory", where=allocation.label)
        memory = [one for one in touched if one[0].kind != "flag"]
        _note(memory, self.host_access("the host"), self._host, writes)

    def host_acquires(self, touched: Sequence[Touched]) -> None:
        """The host saw flags set."""
        for address in _flag_addresses(touched):
            join(self._host, self._flag(address).device)

    def host_releases(self, touched: Sequence[Touched]) -> None:
        """The host is about to set flags."""
        for address in _flag_addresses(touched):
            flag = self._flag(address)
            join(flag.host, self._host)
            flag.num_releases += 1
        self._host[HOST] += 1

    def name_accesses(
        self, operation: Operation, reads: tuple[Touched, ...], writes: tuple[Touched, ...]
    ) -> None:
        """Tells an operation's memory from its flags."""
        operation.awaits = tuple(_flag_addresses(reads))
        operation.sets = tuple(_flag_addresses(writes))
        operation.reads = tuple(one for one in reads if one[0].kind != "flag") if operation.awaits else reads
        operation.writes = tuple(one for one in writes if one[0].kind != "flag") if operation.sets else writes

    def check(self, operation: Operation, clock: Clock) -> None:
        """Orders an operation after what it follows, and each of its accesses. clock: of its stream.

        Raises OrderingError.
        """
        component = operation.stream + 1
        join(clock, operation.seen)
        for before in operation.after:
            join(clock, before.clock or {})
        clock[component] = clock.get(component, 0) + 1
        operation.clock = dict(clock)
        if self.gave_up:
            return
        access = Access(component, clock[component], operation.label)
        _note(operation.reads, access, clock, writes=False)
        _note(operation.writes, access, clock, writes=True)

    def publish(self, operation: Operation) -> None:
        """Whoever sees the flags that the operation sets knows what it knows."""
        for address in operation.sets:
            join(self._flag(address).device, operation.clock or {})

    def acquire(self, operation: Operation, clock: Clock) -> None:
        """The operation saw the flags that it waits for, unless nobody set them and it gave up."""
        for address in operation.awaits:
            flag = self._flag(address)
            if flag.num_releases == flag.num_acquired:
                _log.warning("%s: the host did not set the flag it waits for", operation.label)
                self.gave_up = True
            flag.num_acquired = flag.num_releases
            join(clock, flag.host)

    def _flag(self, address: int) -> _Flag:
        return self._flags.setdefault(address, _Flag())


def _flag_addresses(touched: Sequence[Touched]) -> Iterator[int]:
    for allocation, ranges in touched:
        if allocation.kind == "flag":
            for begin, end in ranges:
                yield from range(allocation.address + begin, allocation.address + end, _FLAG_BYTES)


def _note(touched: Sequence[Touched], access: Access, clock: Clock, writes: bool) -> None:
    for allocation, ranges in touched:
        note = allocation.history.write if writes else allocation.history.read
        for begin, end in ranges:
            conflict = note(begin, end, access, clock)
            if conflict is not None:
                raise _ordering_error(allocation, access, conflict, writes)


def _ordering_error(
    allocation: Allocation, access: Access, conflict: Conflict, writes: bool
) -> OrderingError:
    where = f"{allocation.label}, bytes [{conflict.begin}, {conflict.end})"
    if conflict.other is None:
        return OrderingError(f"{access.label} reads memory that was never written", where=where)
    verb, did = "overwrites" if writes else "reads", "wrote" if conflict.other_wrote else "reads"
    return OrderingError(
        f"{access.label} {verb} what {conflict.other.label} {did}, without being ordered after it",
        where=where,
        hint="wait for an event recorded after it (the host: synchronise with it)",
    )
