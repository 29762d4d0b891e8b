"""Opens the store of a rank's experts: in place if the platform pins mapped files, else an arena, else a
ring.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from krasis.formats.bundle.manifest_records import TABLE_TIER
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError
from krasis.formats.limits import HUGE_PAGE_BYTES
from krasis.formats.units import format_bytes
from krasis.runtime.device.api import Device
from krasis.runtime.host.environment import probe_memory
from krasis.runtime.host_memory.api import Attempt, Choice, ExpertStore
from krasis.runtime.host_memory.arena import ArenaSource
from krasis.runtime.host_memory.choice import Candidate, Facts, candidates
from krasis.runtime.host_memory.experts import Experts, find_experts
from krasis.runtime.host_memory.in_place import InPlaceSource, find_pages, try_register
from krasis.runtime.host_memory.loader import pinning_threads
from krasis.runtime.host_memory.memory import anonymous
from krasis.runtime.host_memory.pinned_store import PinnedStore
from krasis.runtime.host_memory.registrar import (
    Registrar,
    RegistrationError,
    locked_memory_hint,
    registrar_of,
)
from krasis.runtime.host_memory.ring import RingStore
from krasis.runtime.host_memory.shards import Shards
from krasis.runtime.planning.host import host_reserve_bytes
from krasis.runtime.planning.shape import shape_of

logger = logging.getLogger(__name__)


def open_store(
    bundle: Bundle,
    device: Device,
    *,
    first_expert: int = 0,
    num_experts: int | None = None,
    ram_limit_bytes: int | None = None,
    method: str = "auto",
    ring_bytes: int | None = None,
    group_experts: int | None = None,
    num_threads: int | None = None,
    registrar: Registrar | None = None,
) -> ExpertStore:
    """The GPU experts [first_expert, first_expert + num_experts) of every layer in pinned host memory.

    ram_limit_bytes: what this store may use (None: what is available, less a reserve and what the page cache
    must hold of the bundle's other weights; ranks that share a host must be told). method: ``auto``,
    ``in-place``, ``arena`` or ``ring``. group_experts: the most experts that will be asked for at once.
    ring_bytes: of a ring (default: four groups). Loading goes on in the background. The bundle stays open as
    long as the store. Raises ResourceError with the figures if no method works, and what ``find_experts``
    raises.
    """
    experts = find_experts(bundle, first_expert, num_experts)
    shards = Shards(bundle, experts)
    opener = _Opener(bundle, device, experts, shards, registrar or registrar_of(device), num_threads)
    try:
        facts = _facts(bundle, experts, shards, ram_limit_bytes, group_experts, ring_bytes)
        return opener.open(facts, method)
    except BaseException:
        shards.close()
        raise


def _facts(
    bundle: Bundle,
    experts: Experts,
    shards: Shards,
    ram_limit_bytes: int | None,
    group_experts: int | None,
    ring_bytes: int | None,
) -> Facts:
    memory = probe_memory()
    facts = Facts(
        experts_bytes=experts.num_bytes,
        record_bytes=experts.record_bytes,
        num_experts=experts.num_experts,
        available_bytes=memory.available_bytes,
        reserve_bytes=host_reserve_bytes(memory.limit_bytes),
        kept_bytes=sum(
            blob.num_bytes for blob in bundle.manifest.blobs if blob.tier not in ("gpu", TABLE_TIER)
        ),
        filesystems=shards.filesystems,
        ram_limit_bytes=ram_limit_bytes,
        group_experts=group_experts,
        ring_bytes=ring_bytes,
        share=experts.num_experts / shape_of(bundle.spec).num_experts,
    )
    # What lies in RAM already is not counted as available.
    return replace(facts, kept_bytes=0) if facts.in_ram else facts


class _Opener:
    """Tries candidates one after the other, and notes what came of each."""

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        experts: Experts,
        shards: Shards,
        registrar: Registrar,
        num_threads: int | None,
    ) -> None:
        self._bundle, self._device, self._experts, self._shards = bundle, device, experts, shards
        self._registrar, self._num_threads = registrar, num_threads
        self._attempts: list[Attempt] = []

    def open(self, facts: Facts, method: str) -> ExpertStore:
        """The first that works. Raises ResourceError with all reasons if none does."""
        for candidate in candidates(facts, method):
            if not candidate.fits:
                self._note(candidate, candidate.reason)
                continue
            store = self._try(candidate, facts)
            if store is not None:
                return store
        raise ResourceError(
            "GPU experts cannot be pinned in host memory",
            where=str(self._bundle.path),
            got="; ".join(f"{attempt.method}: {attempt.reason}" for attempt in self._attempts),
            hint=locked_memory_hint(facts.experts_bytes)
            or "use a machine with more RAM, or smaller groups of experts",
        )

    def _try(self, candidate: Candidate, facts: Facts) -> ExpertStore | None:
        if candidate.method == "in-place":
            return self._in_place(candidate, facts)
        refusal = try_register(anonymous(HUGE_PAGE_BYTES).reshape(1, -1), self._registrar, read_only=False)
        if refusal is not None:
            self._note(candidate, refusal)
            return None
        if candidate.method == "arena":
            return self._arena(candidate, facts)
        return self._ring(candidate, facts)

    def _in_place(self, candidate: Candidate, facts: Facts) -> ExpertStore | None:
        pages, refusals = find_pages(self._bundle, self._experts, self._shards, self._registrar)
        if pages is None:
            self._note(candidate, f"refused: {refusals}")
            return None
        reason = f"{candidate.reason}; by {pages.description}"
        if refusals:
            reason += f" ({refusals})"
        # Pages of a disk's file can be given back when they are copied, those in RAM stay.
        spare = facts.budget_bytes if facts.in_ram else self._experts.num_bytes
        source = InPlaceSource(self._experts, self._shards, pages, spare)
        choice = self._choose(candidate, reason, facts)
        threads = self._num_threads or pinning_threads()
        return PinnedStore(self._experts, source, self._registrar, choice, num_threads=threads)

    def _arena(self, candidate: Candidate, facts: Facts) -> ExpertStore | None:
        try:
            source = ArenaSource(self._experts, self._shards)
        except ResourceError as error:
            self._note(candidate, str(error))
            return None
        how = self._shards.why_buffered or "reads go past the page cache"
        reason = f"{candidate.reason}; {how}"
        choice = self._choose(candidate, reason, facts)
        return PinnedStore(self._experts, source, self._registrar, choice, num_threads=self._num_threads)

    def _ring(self, candidate: Candidate, facts: Facts) -> ExpertStore | None:
        group = min(
            facts.group_experts or self._experts.num_experts, candidate.ring_bytes // (2 * facts.record_bytes)
        )
        cached = format_bytes(min(facts.cache_bytes(candidate.ring_bytes), facts.experts_bytes))
        try:
            return RingStore(
                self._experts,
                self._shards,
                self._device,
                self._registrar,
                self._choose(
                    candidate, f"{candidate.reason}; {cached} of them kept in the page cache", facts
                ),
                ring_bytes=candidate.ring_bytes,
                group_experts=group,
                cache_bytes=facts.cache_bytes(candidate.ring_bytes),
                num_threads=self._num_threads,
            )
        except RegistrationError as error:
            self._note(candidate, str(error))
            return None

    def _choose(self, candidate: Candidate, reason: str, facts: Facts) -> Choice:
        self._attempts.append(Attempt(candidate.method, True, reason))
        logger.info("host memory: %s: %s", candidate.method, reason)
        return Choice(candidate.method, reason, tuple(self._attempts), facts.figures())

    def _note(self, candidate: Candidate, reason: str) -> None:
        self._attempts.append(Attempt(candidate.method, False, reason))
        logger.info("host memory: not %s: %s", candidate.method, reason)
