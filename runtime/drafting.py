"""Guessed tokens (speculative decoding): who guesses, and what passes have computed ahead of the text.

A pass computes the token that was picked and those that are guessed after it, as rows of one sequence. Logits
behind a guess are used when that very token is picked from the logits before it, by the same sampler as ever:
so the text, greedy or drawn, is that of decoding token by token; guesses only save passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from krasis.runtime.batch import Logits, TokenIds


class Drafter(Protocol):
    """Guesses what follows, from what a backend's passes over a slot left behind. count: the most at once."""

    count: int

    def propose(self, held: Sequence[int] | TokenIds, token: int, count: int, slot: int = 0) -> list[int]:
        """Up to count tokens that may follow ``token``, which follows the tokens that the slot holds. Empty
        where it knows too little.
        """
        ...

    def forget(self, slot: int = 0) -> None:
        """The slot's state is another's from now on, and no pass has made it."""
        ...


@dataclass(slots=True)
class DraftCount:
    """num_drafted: tokens that were guessed and computed. num_accepted: how many of them were right."""

    num_drafted: int = 0
    num_accepted: int = 0


class Ahead:
    """Logits that the last pass computed behind guesses. count: what is counted in."""

    __slots__ = ("_logits", "_next", "_tokens", "count")

    def __init__(self) -> None:
        self.count = DraftCount()
        self._tokens: Sequence[int] = ()
        self._logits: Logits | None = None
        self._next = 0

    def fill(self, tokens: Sequence[int], logits: Logits) -> None:
        """The guesses, and what follows each of them: [len(tokens), vocab], kept as it is."""
        self._tokens, self._logits, self._next = tokens, logits, 0
        self.count.num_drafted += len(tokens)

    def take(self, token: int) -> Logits | None:
        """Logits [vocab] behind a token if it is the next guess and they are numbers; else all is
        forgotten.
        """
        if self._logits is None:
            return None
        if self._next < len(self._tokens) and self._tokens[self._next] == token:
            logits: Logits = self._logits[self._next]
            if math.isfinite(logits[0]):  # of a NaN in a layer all are told
                self._next += 1
                self.count.num_accepted += 1
                return logits
        self.clear()
        return None

    def clear(self) -> None:
        """Forgets the guesses."""
        self._tokens, self._logits = (), None
