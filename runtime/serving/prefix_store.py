"""Prefixes in RAM: token ids with the state computed for them, more of them than there are slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from krasis.formats.errors import KrasisError
from krasis.runtime.batch import StateRows
from krasis.runtime.serving.ids import TokenIds
from krasis.runtime.serving.sorted_prefixes import SortedPrefixes
from krasis.runtime.serving.steps import Found

logger = logging.getLogger(__name__)

Layers = Sequence[tuple[StateRows, StateRows]]


class OnDisk(Protocol):
    """A prefix in a file. num_bytes: of its state."""

    num_bytes: int

    def read(self) -> Layers:
        """Its state. Raises KrasisError if the file is no longer sound."""
        ...


@dataclass(slots=True, eq=False)
class Prefix:
    """layers: keys and values of each layer, [num_kv_heads, len(tokens), head_dim]; None: only on disk.

    can_be_cut: whether every position can be gone on from; else the whole alone. is_side: of a request beside
    a conversation. file: where it lies on disk too. users: jobs that are going to use it.
    """

    key: int
    tokens: TokenIds
    layers: Layers | None
    num_bytes: int
    can_be_cut: bool = True
    is_side: bool = False
    file: OnDisk | None = None
    users: set[str] = field(default_factory=set)

    @property
    def ram_bytes(self) -> int:
        """What it takes of the budget."""
        return 0 if self.layers is None else self.num_bytes


class PrefixStore:
    """At most max_bytes of state in RAM; what was used least recently goes, side prefixes first, prefixes
    that are held never. One thread at a time, but for the numbers.

    spill: gets a prefix that leaves RAM, and says in which file it lies now; None: it is gone.
    num_bytes: in RAM. num_stored, num_evicted: so far.
    """

    def __init__(self, max_bytes: int, spill: Callable[[Prefix], OnDisk | None] | None = None) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.num_stored = self.num_evicted = 0
        self._spill = spill
        self._prefixes: dict[int, Prefix] = {}  # the least recently used first
        self._sorted = {(cut, ram): SortedPrefixes() for cut in (True, False) for ram in (True, False)}
        self._held: dict[str, int] = {}
        self._num_keys = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        """The least recently used first."""
        return iter(self._prefixes.values())

    def match(self, prompt: TokenIds) -> Found | None:
        """See ``steps.PrefixIndex``. Of equals, one in RAM."""
        wanted, best = prompt[:-1], (0, False, -1)
        for (can_be_cut, in_ram), some in self._sorted.items():
            length, key = some.nearest(wanted) if can_be_cut else next(some.beginnings(wanted), (0, -1))
            best = max(best, (length, in_ram, key))
        return Found(best[2], best[0]) if best[0] else None

    def covers(self, tokens: TokenIds) -> bool:
        """See ``steps.PrefixIndex``."""
        for (can_be_cut, _), some in self._sorted.items():
            found = some.has_beginning(tokens)
            if not can_be_cut:
                found = found and next(some.beginnings(tokens), (0, -1))[0] == len(tokens)
            if found:
                return True
        return False

    def hold(self, user: str, key: int) -> None:
        """See ``steps.PrefixIndex``."""
        self.release(user)
        self._prefixes[key].users.add(user)
        self._held[user] = key

    def release(self, user: str) -> None:
        """See ``steps.PrefixIndex``."""
        held = self._prefixes.get(self._held.pop(user, -1))
        if held is not None:
            held.users.discard(user)

    def make_room(self, num_bytes: int, *, is_side: bool = False, tokens: TokenIds | None = None) -> bool:
        """Whether num_bytes fit, after evicting what may go: first what tokens begin with, which is of no use
        then. For a side prefix only side prefixes go.
        """
        useless = (
            {} if tokens is None else {one.key: one for one in self._beginnings(tokens) if not one.users}
        )
        free = self.max_bytes - self.num_bytes + sum(one.ram_bytes for one in useless.values())
        going: list[Prefix] = []
        for of_side in (True,) if is_side else (True, False):
            for one in self if free < num_bytes else ():
                if one.layers is None or one.users or one.key in useless or one.is_side != of_side:
                    continue
                going.append(one)
                free += one.num_bytes
                if free >= num_bytes:
                    break
        if free < num_bytes:
            return False
        for one in useless.values():
            self._drop(one)
        for one in going:
            self._evict(one)
        return True

    def put(
        self, tokens: TokenIds, layers: Layers, *, can_be_cut: bool = True, is_side: bool = False
    ) -> bool:
        """Keeps a prefix, whose arrays are the store's from now on. False if there is no room for it."""
        num_bytes = sum(keys.nbytes + values.nbytes for keys, values in layers)
        if not self.make_room(num_bytes, is_side=is_side, tokens=tokens if can_be_cut else None):
            return False
        self._add(Prefix(0, tokens.copy(), layers, num_bytes, can_be_cut, is_side))
        self.num_bytes += num_bytes
        self.num_stored += 1
        return True

    def add_file(self, tokens: TokenIds, file: OnDisk, *, can_be_cut: bool = True) -> None:
        """A prefix that is on disk only."""
        self._add(Prefix(0, tokens, None, file.num_bytes, can_be_cut, file=file))

    def take(self, key: int) -> tuple[Prefix, Layers]:
        """A prefix and its state, read from disk if it must be. Raises KrasisError if that cannot be read;
        then the prefix is forgotten."""
        one = self._prefixes[key]
        self._use(one)
        if one.layers is not None:
            return one, one.layers
        if one.file is None:
            raise KrasisError("a stored prefix has no state")
        try:
            layers = one.file.read()
        except KrasisError:
            self._drop(one)
            raise
        if self.make_room(one.num_bytes):
            self._move(one, layers)
        return one, layers

    def _add(self, one: Prefix) -> None:
        self._num_keys += 1
        one.key = self._num_keys
        self._prefixes[one.key] = one
        self._place_of(one).add(one.tokens, one.key)

    def _use(self, one: Prefix) -> None:
        self._prefixes[one.key] = self._prefixes.pop(one.key)

    def _place_of(self, one: Prefix) -> SortedPrefixes:
        return self._sorted[one.can_be_cut, one.layers is not None]

    def _move(self, one: Prefix, layers: Layers | None) -> None:
        """Into RAM, or out of it."""
        self._place_of(one).remove(one.tokens, one.key)
        self.num_bytes -= one.ram_bytes
        one.layers = layers
        self.num_bytes += one.ram_bytes
        self._place_of(one).add(one.tokens, one.key)

    def _beginnings(self, tokens: TokenIds) -> Iterator[Prefix]:
        """Those that tokens begin with."""
        for some in self._sorted.values():
            yield from (self._prefixes[key] for _, key in some.beginnings(tokens))

    def _evict(self, one: Prefix) -> None:
        self.num_evicted += 1
        if one.file is None and self._spill is not None and not one.is_side:
            one.file = self._spill(one)
        if one.file is None:
            self._drop(one)
        elif one.layers is not None:
            self._move(one, None)

    def _drop(self, one: Prefix) -> None:
        del self._prefixes[one.key]
        self._place_of(one).remove(one.tokens, one.key)
        self.num_bytes -= one.ram_bytes
        one.layers = None
        for user in one.users:
            self._held.pop(user, None)
