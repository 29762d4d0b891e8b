"""Which tokens a prefill pass computes, and where they go."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Batch, Span
from krasis.runtime.gpu.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Piece:
    """Own rows [first, last) of local buffers: consecutive positions of one slot from ``position`` on."""

    first: int
    last: int
    position: int
    slot: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """num_tokens tokens of all ranks; of these this rank computes ``own``, in the ranges ``segments`` of the
    tokens (ascending), which are ``pieces`` of its rows. start: of the only sequence that several ranks
    share, whose slot is ``slot``.
    """

    num_tokens: int
    own: int
    segments: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]
    start: int
    slot: int


def chunk_of(batch: Batch, parallel: Parallel) -> Chunk:
    """The chunk of a batch on this rank. Raises NativeError for several sequences on several ranks."""
    count, first = len(batch.tokens), batch.spans[0]
    if parallel.num_ranks == 1:
        pieces = tuple(Piece(s.first_row, s.end_row, s.start, s.slot) for s in batch.spans)
        return Chunk(count, count, ((0, count),), pieces, first.start, first.slot)
    if len(batch.spans) > 1:
        raise NativeError(
            "several ranks compute one sequence at a time", where="prefill", got=len(batch.spans)
        )
    segments = parallel.own_segments(count)
    rows: list[Piece] = []
    row = 0
    for begin, end in segments:
        rows.append(Piece(row, row + end - begin, first.start + begin, first.slot))
        row += end - begin
    return Chunk(count, row, segments, tuple(rows), first.start, first.slot)


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
