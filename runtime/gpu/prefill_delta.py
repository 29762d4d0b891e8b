"""The gated delta rule of a prefill pass. A row depends on all before it, and ranks have rows from here and
there: so each computes all tokens of such a layer, and keeps its own rows of the result. The states are then
the same on every rank, as keys and values are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
from krasis.runtime.gpu.blocks.rows import packed
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Piece
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.planning.workspace import DELTA_ROWS

if TYPE_CHECKING:
    from krasis.runtime.gpu.prefill import PrefillRows


def apply_delta(rows: PrefillRows, block: GpuGatedDelta, gates: torch.Tensor, out: torch.Tensor) -> None:
    """See ``PassRows``."""
    if rows.parallel.num_ranks > 1:
        _on_all_ranks(rows, block, out)
        return
    b, mixer = rows.own, block.form.mixer
    projected, mixed = packed(b.qkv, block.qkvz.num_rows), packed(b.delta_mixed, mixer.conv_channels)
    rows.product(b.x, block.qkvz, projected)
    for piece in rows.chunk.pieces:
        for part in _cut(rows, piece):
            own = slice(part.first, part.last)
            _run(rows, block, part, (projected[own], gates[own], mixed[own], out[own]))


def exchange_delta(
    stream: Stream, parallel: Parallel, buffers: Buffers, block: GpuGatedDelta, num_tokens: int
) -> tuple[Callable[[], None], ...]:
    """What ranks exchange in such a layer, in order: what the projections take, and the gates."""
    b, columns = buffers, 2 * block.form.mixer.value_heads
    gates, gathered = packed(b.delta_gates, columns), packed(b.gathered_gates, columns)
    return (
        lambda: parallel.gather_tokens(stream, b.x, b.gathered_x, num_tokens),
        lambda: parallel.gather_tokens(stream, gates, gathered, num_tokens),
    )


def _on_all_ranks(rows: PrefillRows, block: GpuGatedDelta, out: torch.Tensor) -> None:
    b, chunk, mixer, stream = rows.buffers, rows.chunk, block.form.mixer, rows.stream
    for exchange in exchange_delta(stream, rows.parallel, b, block, chunk.num_tokens):
        exchange()
    columns, values = 2 * mixer.value_heads, mixer.value_heads * mixer.value_dim
    gates = packed(b.ordered_gates, columns)[: chunk.num_tokens]
    x = b.delta_x[: chunk.num_tokens]
    rows.parallel.restore_order(stream, b.gathered_x, x, chunk.lengths)
    rows.parallel.restore_order(stream, packed(b.gathered_gates, columns), gates, chunk.lengths)
    own = list(zip(chunk.segments, chunk.pieces, strict=True))
    for span in chunk.spans:
        for part in _cut(rows, Piece(span.first_row, span.end_row, span.start, span.slot), DELTA_ROWS):
            count = part.last - part.first
            projected = packed(b.delta_projected[:count], block.qkvz.num_rows)
            mixed = packed(b.delta_mixed[:count], mixer.conv_channels)
            result = packed(b.delta_out[:count], values)
            rows.product(x[part.first : part.last], block.qkvz, projected)
            _run(rows, block, part, (projected, gates[part.first : part.last], mixed, result))
            for (begin, end), piece in own:
                first, last = max(begin, part.first), min(end, part.last)
                if first < last:
                    at = piece.first + first - begin
                    stream.copy(out[at : at + last - first], result[first - part.first : last - part.first])


def _cut(rows: PrefillRows, piece: Piece, most: int | None = None) -> list[Piece]:
    """The piece, cut where states are copied, in parts of so many rows at most."""
    cuts = set(rows.model.cache.borders.get(piece.slot, {}))
    if most is not None:
        cuts |= set(range(piece.position, piece.position + piece.last - piece.first, most))
    return [
        Piece(first, last, piece.position + first - piece.first, piece.slot)
        for first, last in piece.cut_at(cuts)
    ]


def _run(rows: PrefillRows, block: GpuGatedDelta, part: Piece, tensors: tuple[torch.Tensor, ...]) -> None:
    """The rule on a part's rows of (projected, gates, mixed, out), and the copy behind it."""
    cache, (projected, gates, mixed, out) = rows.model.cache, tensors
    place = DeltaPlace(*cache.states(part.slot, block.layer), part.position)
    run = rows.model.kernels.gated_delta
    run(rows.stream, projected, gates, block.form, place, mixed, out, rows.buffers.delta_chunks)
    number = cache.borders.get(part.slot, {}).get(part.position + part.last - part.first)
    if number is not None:
        cache.copy_state(rows.stream, part.slot, block.layer, number)
