"""Tokens that rank 0 decodes with the other ranks of its host.

Rank 0 says so once (the command "decode"); from there on the others wait for its bell in shared memory
(``gpu.parallel_memory``), which costs microseconds where a command costs a millisecond, until it needs them
for something else. Between the layers of a pass, in which they are busy, it decodes alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from krasis.runtime.batch import Batch
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.interrupts import interrupts_deferred
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower


class JointDecode:
    """Rank 0's side. who: decodes, in a few words."""

    def __init__(self, inner: RankedBackend, control: Control) -> None:
        link = inner.decode_ranks
        self._control, self._link = control, link if isinstance(link, RankLink) else None
        self.who = "rank 0" if self._link is None else "ranks of this host"

    @contextmanager
    def token(self, batch: Batch) -> Generator[None]:
        """Around what rank 0 computes without a pass of all ranks: a token of each sequence is decoded with
        their help. An error then ends the job, and so does a second Ctrl-C; one waits for the token."""
        if self._link is None or any(span.rows > 1 for span in batch.spans):
            yield
            return
        with interrupts_deferred(), self._control.working("decode"):
            if not self._link.is_open:
                self._control.send("decode")
                self._link.open(self._control.raise_if_failed)
            yield

    def end(self) -> None:
        """The others listen for commands again; does nothing if they do."""
        if self._link is not None:
            self._link.close()


def follow_decode(backend: RankedBackend, control: Control) -> None:
    """What the others do: compute their experts until rank 0 needs them for something else. A rank of
    another host has nothing to do. Raises RankError if the job fails."""
    follower = backend.decode_ranks
    if isinstance(follower, RankFollower):
        with control.working("decode"):
            follower.follow(control.raise_if_failed)
