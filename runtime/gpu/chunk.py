"""Which tokens a prefill pass computes, and where they go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from krasis.runtime.batch import Batch, Span
from krasis.runtime.gpu.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Piece:
    """Own rows [first, last) of local buffers: consecutive positions of one slot from ``position`` on."""

    first: int
    last: int
    position: int
    slot: int

    def cut_at(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """Its rows, cut before these positions."""
        inner = (at - self.position + self.first for at in sorted(positions))
        cuts = [self.first, *(row for row in inner if self.first < row < self.last), self.last]
        return list(pairwise(cuts))


@dataclass(frozen=True, slots=True)
class Chunk:
    """num_tokens tokens of all ranks, of the sequences that ``spans`` names; of these this rank computes
    ``own``, in the ranges ``segments`` of the tokens (ascending), which are ``pieces`` of its rows.
    """

    num_tokens: int
    own: int
    segments: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]
    spans: tuple[Span, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(span.rows for span in self.spans)


def chunk_of(batch: Batch, parallel: Parallel) -> Chunk:
    """The chunk of a batch on this rank."""
    segments = parallel.own_segments([span.rows for span in batch.spans])
    pieces: list[Piece] = []
    spans = iter(batch.spans)
    span, row = next(spans), 0
    for begin, end in segments:
        while begin >= span.end_row:
            span = next(spans)
        pieces.append(Piece(row, row + end - begin, span.start + begin - span.first_row, span.slot))
        row += end - begin
    return Chunk(len(batch.tokens), row, segments, tuple(pieces), batch.spans)


def part_of(batch: Batch, begin: int, end: int) -> Batch:
    """Rows [begin, end) of a batch, as far as it goes. A span that goes on after them gives no logits of its
    last row here, unless all are wanted."""
    end = min(end, len(batch.tokens))
    if (begin, end) == (0, len(batch.tokens)):
        return batch
    spans: list[Span] = []
    for span in batch.spans:
        first, last = max(span.first_row, begin), min(span.end_row, end)
        if first >= last:
            continue
        goes_on = span.logits == "last" and last < span.end_row
        logits = "none" if goes_on else span.logits
        spans.append(
            Span(span.slot, first - begin, last - first, span.start + first - span.first_row, logits)
        )
    return Batch(batch.tokens[begin:end], tuple(spans))
