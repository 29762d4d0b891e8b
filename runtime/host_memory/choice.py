"""Which store suits a machine: a pure function of a few figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from krasis.formats.errors import UsageError
from krasis.formats.units import format_bytes
from krasis.runtime.host.filesystem import IN_RAM
from krasis.runtime.host_memory.api import METHODS, Method

RING_GROUPS = 4
"""Slots of a ring whose size nobody gave: one on its way to the GPU, one ready, two being read."""

LEAST_RING_GROUPS = 2


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides. All ``_bytes`` of this rank.

    available_bytes: RAM that can be had without swapping, page cache included, within the cgroup's limit.
    reserve_bytes: left to the system. kept_bytes: what the page cache must go on holding (CPU experts, dense
    weights). ram_limit_bytes: what the caller allows, kept_bytes already taken off; None: nothing said.
    group_experts: of the largest group that will be asked for; None: not known. filesystems: that the files
    lie on. share: of all the model's GPU experts that this rank has.
    """

    experts_bytes: int
    record_bytes: int
    num_experts: int
    available_bytes: int
    reserve_bytes: int
    kept_bytes: int
    filesystems: tuple[str, ...]
    ram_limit_bytes: int | None = None
    group_experts: int | None = None
    ring_bytes: int | None = None
    share: float = 1.0

    @property
    def in_ram(self) -> bool:
        """Whether the files lie in RAM already."""
        return bool(self.filesystems) and set(self.filesystems) <= IN_RAM

    @property
    def budget_bytes(self) -> int:
        """What a store may add to the RAM in use."""
        left = self.available_bytes - self.reserve_bytes
        if self.ram_limit_bytes is not None:
            return max(0, min(left, self.ram_limit_bytes))
        return max(0, left - self.kept_bytes)

    @property
    def ring_budget_bytes(self) -> int:
        """What a ring may take: it is small, and rather than refuse to run the page cache gives way to it."""
        left = self.available_bytes - self.reserve_bytes
        return max(0, left if self.ram_limit_bytes is None else min(left, self.ram_limit_bytes))

    def cache_bytes(self, ring_bytes: int) -> int:
        """What the page cache can keep of this rank's experts beside a ring and everything else."""
        left = self.available_bytes - self.reserve_bytes - self.kept_bytes - ring_bytes
        return max(0, int(left * self.share))

    @property
    def group_bytes(self) -> int:
        """Bytes of the largest group: a whole layer if nobody said otherwise."""
        return (self.group_experts or self.num_experts) * self.record_bytes

    @property
    def least_ring_bytes(self) -> int:
        """Two groups; two experts if nobody said how large groups are."""
        return LEAST_RING_GROUPS * (self.group_experts or 1) * self.record_bytes

    def figures(self) -> dict[str, int | str]:
        """Everything, for logs and JSON."""
        record = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        return {**record, "budget_bytes": self.budget_bytes, "filesystems": ", ".join(self.filesystems)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method, whether there is RAM for it, and why or why not. ring_bytes: of a ring."""

    method: Method
    fits: bool
    reason: str
    ring_bytes: int = 0


def candidates(facts: Facts, method: str = "auto") -> tuple[Candidate, ...]:
    """The methods in the order of trying: the one named, or all. UsageError for an unknown name."""
    if method not in ("auto", *METHODS):
        raise UsageError("unknown store of experts", got=method, limit=", ".join(("auto", *METHODS)))
    found = (_in_place(facts), _arena(facts), _ring(facts))
    return tuple(item for item in found if method in ("auto", item.method))


def _room(facts: Facts) -> str:
    limit = (
        f", at most {format_bytes(facts.ram_limit_bytes)} allowed"
        if facts.ram_limit_bytes is not None
        else ""
    )
    kept = (
        f", {format_bytes(facts.kept_bytes)} kept for other weights" if facts.ram_limit_bytes is None else ""
    )
    return (
        f"{format_bytes(facts.budget_bytes)} of RAM may be used ({format_bytes(facts.available_bytes)} "
        f"available, {format_bytes(facts.reserve_bytes)} reserve{kept}{limit})"
    )


def _in_place(facts: Facts) -> Candidate:
    size = format_bytes(facts.experts_bytes)
    if facts.in_ram:
        where = ", ".join(facts.filesystems)
        return Candidate(
            "in-place", True, f"the bundle lies in RAM ({where}): {size} pinned there, nothing copied"
        )
    if facts.experts_bytes <= facts.budget_bytes:
        return Candidate("in-place", True, f"{size} of page cache pinned, nothing copied; {_room(facts)}")
    return Candidate("in-place", False, f"{size} of page cache would have to stay in RAM, but {_room(facts)}")


def _arena(facts: Facts) -> Candidate:
    size, room = format_bytes(facts.experts_bytes), _room(facts)
    if facts.experts_bytes <= facts.budget_bytes:
        return Candidate("arena", True, f"an arena of {size} fits: {room}")
    return Candidate("arena", False, f"an arena of {size} does not fit: {room}")


def _ring(facts: Facts) -> Candidate:
    wanted = facts.ring_bytes or RING_GROUPS * facts.group_bytes
    least = facts.least_ring_bytes
    most = min(facts.ring_budget_bytes, max(facts.budget_bytes, least))
    ring = min(wanted, most) // facts.record_bytes * facts.record_bytes
    if ring < least:
        reason = (
            f"a pinned ring needs {format_bytes(least)} at least, but {format_bytes(facts.available_bytes)} "
            f"are available, {format_bytes(facts.reserve_bytes)} of them reserve"
        )
        if facts.ram_limit_bytes is not None and facts.ram_limit_bytes < least:
            reason += f", and {format_bytes(facts.ram_limit_bytes)} allowed"
        if wanted < least:
            asked = format_bytes(wanted)
            reason = f"a pinned ring of {asked} was asked for; it needs {format_bytes(least)} at least"
        return Candidate("ring", False, reason)
    return Candidate(
        "ring", True, f"a pinned ring of {format_bytes(ring)} in front of the files; {_room(facts)}", ring
    )
