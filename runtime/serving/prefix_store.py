"""Prefixes in RAM: token ids with the state computed for them, more of them than there are slots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from krasis.formats.errors import KrasisError
from krasis.runtime.batch import StateRows
from krasis.runtime.serving.ids import TokenIds, shared_length
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
    used: int = 0
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
        self._prefixes: dict[int, Prefix] = {}
        self._held: dict[str, int] = {}
        self._num_keys = self._tick = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __iter__(self) -> Iterator[Prefix]:
        """The least recently used first."""
        return iter(sorted(self._prefixes.values(), key=lambda one: one.used))

    def match(self, prompt: TokenIds) -> Found | None:
        """See ``steps.PrefixIndex``. Of equals, one in RAM."""
        best, rank = None, (0, False)
        for one in self._prefixes.values():
            length = min(shared_length(one.tokens, prompt), len(prompt) - 1)
            if length < len(one.tokens) and not one.can_be_cut:
                continue
            if length and (length, one.layers is not None) > rank:
                best, rank = Found(one.key, length), (length, one.layers is not None)
        return best

    def covers(self, tokens: TokenIds) -> bool:
        """See ``steps.PrefixIndex``."""
        return any(
            shared_length(one.tokens, tokens) == len(tokens)
            and (one.can_be_cut or len(one.tokens) == len(tokens))
            for one in self._prefixes.values()
        )

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
        useless = [] if tokens is None else [one for one in self if _begins(tokens, one) and not one.users]
        free = self.max_bytes - self.num_bytes + sum(one.ram_bytes for one in useless)
        going: list[Prefix] = []
        for one in sorted(self, key=lambda one: not one.is_side):  # the sort keeps the order of use
            if free >= num_bytes:
                break
            if one.layers is None or one.users or one in useless or (is_side and not one.is_side):
                continue
            going.append(one)
            free += one.num_bytes
        if free < num_bytes:
            return False
        for one in useless:
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
            one.layers = layers
            self.num_bytes += one.num_bytes
        return one, layers

    def _add(self, one: Prefix) -> None:
        self._num_keys += 1
        one.key = self._num_keys
        self._prefixes[one.key] = one
        self._use(one)

    def _use(self, one: Prefix) -> None:
        self._tick += 1
        one.used = self._tick

    def _evict(self, one: Prefix) -> None:
        self.num_evicted += 1
        if one.file is None and self._spill is not None and not one.is_side:
            one.file = self._spill(one)
        if one.file is None:
            self._drop(one)
        elif one.layers is not None:
            one.layers = None
            self.num_bytes -= one.num_bytes

    def _drop(self, one: Prefix) -> None:
        del self._prefixes[one.key]
        self.num_bytes -= one.ram_bytes
        one.layers = None
        for user in one.users:
            self._held.pop(user, None)


def _begins(tokens: TokenIds, prefix: Prefix) -> bool:
    """Whether tokens begin with a prefix."""
    return shared_length(prefix.tokens, tokens) == len(prefix.tokens)
