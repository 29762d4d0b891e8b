"""Layers with a state in a prefill pass. A row depends on all before it, and ranks have rows from here and
there: so each computes all tokens of such a layer, and keeps its own rows of the result. The states are then
the same on every rank, as keys and values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import StateBlock, gate_matrices, packed
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Piece
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.planning.workspace import DELTA_ROWS, STREAM_ROWS

if TYPE_CHECKING:
    from krasis.runtime.gpu.prefill import PrefillRows


def apply_state(
    rows: PrefillRows, block: StateBlock, gates: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """See ``PassRows``."""
    if rows.parallel.num_ranks > 1:
        _on_all_ranks(rows, block, out)
        return
    b = rows.own
    projected, mixed = packed(b.qkv, block.projection.num_rows), packed(b.delta_mixed, block.num_mixed)
    rows.product(b.x, block.projection, projected)
    for piece in rows.chunk.pieces:
        for part in _cut(rows, piece):
            own = slice(part.first, part.last)
            _run(rows, block, part, [one[own] for one in gates], (projected[own], mixed[own], out[own]))


def exchange_delta(
    stream: Stream, parallel: Parallel, buffers: Buffers, block: StateBlock, num_tokens: int, num_own: int
) -> tuple[Callable[[], None], ...]:
    """What ranks exchange in such a layer, in order: what the projections take, and the gates. num_own: this
    rank's rows."""
    b = buffers
    own, gathered = (
        gate_matrices(b.delta_gates, block.gates, num_own),
        gate_matrices(b.gathered_gates, block.gates),
    )
    # The last one first: a rank with a row less fills up the row behind its last, where the next one begins.
    gates = (
        partial(parallel.gather_tokens, stream, *pair, num_tokens)
        for pair in reversed(list(zip(own, gathered, strict=True)))
    )
    return (lambda: parallel.gather_tokens(stream, b.x, b.gathered_x, num_tokens), *gates)


def _on_all_ranks(rows: PrefillRows, block: StateBlock, out: torch.Tensor) -> None:
    b, chunk, stream = rows.buffers, rows.chunk, rows.stream
    for exchange in exchange_delta(stream, rows.parallel, b, block, chunk.num_tokens, chunk.own):
        exchange()
    x = b.delta_x[: chunk.num_tokens]
    rows.parallel.restore_order(stream, b.gathered_x, x, chunk.lengths)
    gates = [one[: chunk.num_tokens] for one in gate_matrices(b.ordered_gates, block.gates)]
    for gathered, ordered in zip(gate_matrices(b.gathered_gates, block.gates), gates, strict=True):
        rows.parallel.restore_order(stream, gathered, ordered, chunk.lengths)
    own = list(zip(chunk.segments, chunk.pieces, strict=True))
    for span in chunk.spans:
        for part in _cut(rows, Piece(span.first_row, span.end_row, span.start, span.slot), DELTA_ROWS):
            count = part.last - part.first
            projected = packed(b.delta_projected[:count], block.projection.num_rows)
            mixed = packed(b.delta_mixed[:count], block.num_mixed)
            result = packed(b.delta_out[:count], block.num_out)
            rows.product(x[part.first : part.last], block.projection, projected)
            _run(
                rows, block, part, [one[part.first : part.last] for one in gates], (projected, mixed, result)
            )
            for (begin, end), piece in own:
                first, last = max(begin, part.first), min(end, part.last)
                if first < last:
                    at = piece.first + first - begin
                    stream.copy(out[at : at + last - first], result[first - part.first : last - part.first])


def table_parts(rows: PrefillRows, layer: int) -> Iterator[tuple[int, int, DeltaPlace]]:
    """See ``PassRows``: of one rank."""
    cache = rows.model.cache
    table = rows.model.spec.ngram
    num_past = 0 if table is None else table.past_rows * rows.model.spec.residual_width
    for piece in rows.chunk.pieces:
        for part in _cut(rows, piece, STREAM_ROWS):
            kept = cache.table(part.slot, layer)
            yield part.first, part.last, DeltaPlace(kept[:0], kept[:num_past], part.position)
            number = cache.borders.get(part.slot, {}).get(part.position + part.last - part.first)
            if number is not None:
                cache.copy_table(rows.stream, part.slot, layer, number)


def _cut(rows: PrefillRows, piece: Piece, most: int | None = None) -> list[Piece]:
    """The piece, cut where states are copied, in parts of so many rows at most."""
    cuts = set(rows.model.cache.borders.get(piece.slot, {}))
    if most is not None:
        cuts |= set(range(piece.position, piece.position + piece.last - piece.first, most))
    return [
        Piece(first, last, piece.position + first - piece.first, piece.slot)
        for first, last in piece.cut_at(cuts)
    ]


def _run(
    rows: PrefillRows,
    block: StateBlock,
    part: Piece,
    gates: Sequence[torch.Tensor],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """A part's rows of (projected, mixed, out), and the copy behind it."""
    cache, (projected, mixed, out) = rows.model.cache, tensors
    place = DeltaPlace(*cache.states(part.slot, block.layer), part.position)
    block.advance(rows.stream, projected, gates, place, mixed, out, rows.buffers.delta_chunks)
    number = cache.borders.get(part.slot, {}).get(part.position + part.last - part.first)
    if number is not None:
        cache.copy_state(rows.stream, part.slot, block.layer, number)
