"""What lies between the projections of compressed attention, in NumPy, for both backends: norms, rotations,
what is kept of a sequence, and attention. ``compressed_reference`` has the formulas.

Of each token its key is kept, and in layers that compress what entries are made of. The entry of a window
takes the place of its last token's own part of the keys, which no other entry needs: whoever goes back to
before that token computes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import CompressedAttention
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.compressed_reference import Past, attend, chosen_entries, entries_of, turned
from krasis.runtime.cpu.rope import RopeTables
from krasis.runtime.cpu.weights import LayerWeights
from krasis.runtime.state.kv_store import KvStore

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Projected:
    """Products of the rows of a pass. q: [T, heads * dim]; kv: [T, >= dim]. raw: what is compressed, in the
    order of ``CompressedAttention.kept_parts`` (none without). index_q: [T, heads * dim] and index_weights:
    [T, heads] of the index.
    """

    q: FloatArray
    kv: FloatArray
    raw: tuple[FloatArray, ...] = ()
    index_q: FloatArray | None = None
    index_weights: FloatArray | None = None


class CompressedCore:
    """A layer's attention. eps: of the norms."""

    def __init__(
        self,
        store: KvStore,
        layer: int,
        mixer: CompressedAttention,
        weights: LayerWeights,
        tables: RopeTables,
        eps: float,
    ) -> None:
        place = store.places[layer]
        if place is None:
            raise NativeError("the layer keeps nothing", where="compressed attention", got=layer)
        self._store, self._layer, self._mixer, self._weights = store, layer, mixer, weights
        self._tables, self._eps, self._place = tables, eps, place

    def run(self, projected: Projected, spans: tuple[Span, ...], out: FloatArray) -> None:
        """out [T, heads * dim] of all rows; what is kept of their sequences goes on."""
        self._tables.ensure(max(span.end for span in spans))
        for span in spans:
            rows = slice(span.first_row, span.end_row)
            out[rows] = self._attended(projected, rows, span).reshape(span.rows, -1)

    def _attended(self, projected: Projected, rows: slice, span: Span) -> FloatArray:
        mixer, dim = self._mixer, self._mixer.head_dim
        q = projected.q[rows].reshape(span.rows, mixer.heads, dim)
        q = self._turned(reference.rms_norm(q, np.ones(dim, np.float32), self._eps), span)
        norm = self._weights.vector("attention.kv_norm")
        kv = reference.rms_norm(projected.kv[rows, :dim], norm, self._eps)
        self._keep(self._turned(kv[:, None], span)[:, 0], [raw[rows] for raw in projected.raw], span)
        past = self._past(projected, rows, span)
        mixed = attend(q, past, span.start, mixer, self._weights.vector("attention.sinks"))
        return self._turned(mixed, span, back=True)

    def _turned(self, x: FloatArray, span: Span, *, back: bool = False) -> FloatArray:
        at = slice(span.start, span.end)
        return turned(x, self._tables.cos[at], self._tables.sin[at], self._mixer.rope, back=back)

    def _keep(self, keys: FloatArray, raw: list[FloatArray], span: Span) -> None:
        """Writes what is kept of the span's tokens, and the entries that become whole with them."""
        to_keys, to_values = self._store.layer(span.slot, self._layer)
        to_keys[0, span.start : span.end] = self._place.key.kept(keys)
        if self._mixer.ratio is None:
            return
        to_values[0, span.start : span.end] = self._place.value.kept(np.concatenate(raw, axis=1))
        first, last = span.start // self._mixer.ratio, span.end // self._mixer.ratio
        if first == last:
            return
        prefixes = ("compressor",) if self._mixer.selection is None else ("compressor", "index.compressor")
        for number, prefix in enumerate(prefixes):
            made = self._entries(span.slot, prefix, number, first, last)
            ratio = self._mixer.ratio
            ends = to_values[0, (first + 1) * ratio - 1 : last * ratio : ratio]
            self._place.value.put_part(ends, self._entry_part(number), made)

    def _entry_part(self, number: int) -> int:
        """Which kept part has entries, of the layer's own compressor (0) or its index's (1)."""
        return 4 * number + 1 if self._mixer.overlap else 2 * number

    def _entries(self, slot: int, prefix: str, number: int, first: int, last: int) -> FloatArray:
        """[last - first, dim]: the entries of windows whose tokens are all kept, normed and turned."""
        mixer, form = self._mixer, self._place.value
        ratio, halves = mixer.ratio or 1, 2 if mixer.overlap else 1
        before = 1 if mixer.overlap and first else 0
        kept = self._store.layer(slot, self._layer)[1][0, (first - before) * ratio : last * ratio]
        base = 2 * halves * number
        keys, gates = (
            np.concatenate([form.part(kept, base + part + half) for half in range(halves)], axis=1)
            for part in (0, halves)
        )
        shape = (last - first + before, ratio, -1)
        positions = self._weights.vector(f"{prefix}.position")
        made = entries_of(keys.reshape(shape), gates.reshape(shape), positions, overlap=mixer.overlap)
        normed = reference.rms_norm(made[before:], self._weights.vector(f"{prefix}.norm"), self._eps)
        at = slice(first * ratio, last * ratio, ratio)
        cos, sin = self._tables.cos[at], self._tables.sin[at]
        return turned(normed[:, None], cos, sin, mixer.rope)[:, 0]

    def _past(self, projected: Projected, rows: slice, span: Span) -> Past:
        mixer, place = self._mixer, self._place
        keys, values = self._store.layer(span.slot, self._layer)
        first = max(0, span.start - mixer.window + 1)
        own = place.key.floats(keys[0, first : span.end]).astype(np.float32)
        if mixer.ratio is None:
            return Past(own, first, own[:0])
        ends = values[0, mixer.ratio - 1 : span.end // mixer.ratio * mixer.ratio : mixer.ratio]
        if mixer.selection is None or projected.index_q is None or projected.index_weights is None:
            return Past(own, first, place.value.part(ends, self._entry_part(0)))
        index = mixer.selection
        q = projected.index_q[rows].reshape(span.rows, index.heads, index.dim)
        chosen = chosen_entries(
            self._turned(q, span),
            projected.index_weights[rows],
            place.value.part(ends, self._entry_part(1)),
            span.start,
            mixer.ratio,
            index.budget,
        )
        if span.rows == 1:  # of a long past few are chosen: only these are looked at
            ends, chosen = ends[chosen[0]], chosen[:, chosen[0]]
        return Past(own, first, place.value.part(ends, self._entry_part(0)), chosen)
