"""The layer for multi-token prediction on the CPU: guesses tokens from the model's last hidden states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.batch import Batch, one_sequence
from krasis.runtime.cpu.blocks import Block, CpuContext, FloatArray, Rows, cpu_block
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import aligned_empty
from krasis.runtime.cpu.program import Program
from krasis.runtime.cpu.rope import tables_of
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans
from krasis.runtime.cpu.weights import LayerWeights, ModelWeights
from krasis.runtime.settings import MAX_DRAFTS
from krasis.runtime.state.kv_store import KvStore

KEPT_ROWS = 16  # hidden states before those of the last pass: the end of an answer that is taken back


def draft_spec(spec: ModelSpec, weights: LayerWeights) -> ModelSpec:
    """The drafting layer as a model of its own."""
    return replace(spec, layers=(replace(weights.layer, drafts=False),), draft_layers=0)


class CpuDraft:
    """See ``drafting.Drafter``. Of position p it computes, from the model's hidden state there and the token
    of p + 1, what the token of p + 2 may be; it has keys and values of its own.

    Where hidden states are missing (behind a saved prefix) it goes on from there: it then sees less, and
    guesses worse. Its memory's positions count from where it began. logits: float32 [1, >= vocab], by which
    the last guess was made.
    """

    def __init__(self, context: CpuContext, weights: ModelWeights, store: KvStore, count: int) -> None:
        """context: of the model, whose buffers it shares and which are not made yet. store: of
        ``draft_spec``, for itself.
        """
        layer = weights.draft
        if layer is None:
            raise NativeError("these weights have no layer that drafts", where="draft")
        self.count = count
        self._weights, self._layer, self._store = weights, layer, store
        spec = draft_spec(context.spec, layer)
        caches = tuple(_cache(store, index) for index in range(1))
        self._ropes = tables_of(spec, store.capacity)
        self._context = replace(context, spec=spec, caches=caches, ropes=self._ropes, fixed=())
        self._buffers, hidden = context.buffers, spec.hidden
        for name, columns in (("draft", hidden), ("draft_embedding", hidden), ("draft_input", 2 * hidden)):
            self._buffers.reserve(name, columns)
        self._buffers.reserve_acts(2 * hidden)
        parts = (layer.layer.mixer, layer.layer.mlp)
        self._blocks: list[Block] = [
            cpu_block(self._context, 0, part, layer) for part in parts if part is not None
        ]
        self._slot = store.open()
        self._memory = SlotMemory(*store.memory(self._slot))
        self._spans = Spans(1, store.keys_bytes, store.values_bytes)
        self._normed = aligned_empty((1, hidden), np.float32)
        self.logits = aligned_empty((1, weights.lm_head.num_rows), np.float32)
        self._kernels: Kernels | None = None
        self._programs: dict[int, Program] = {}
        self._base = self._done = 0
        self._saved_start, self._saved = 0, np.empty((0, hidden), np.float32)

    def start(self, kernels: Kernels) -> None:
        """Before the first pass: what runs native calls."""
        self._kernels = kernels

    def forget(self) -> None:
        """See ``Drafter``."""
        self._saved = self._saved[:0]

    def follow(self, batch: Batch, hidden: FloatArray) -> None:
        """After a pass: hidden float32 [T, hidden], what the last layer left of its rows."""
        span = next((one for one in batch.spans if one.slot == 0), None)
        if span is None:
            return
        rows, tokens = hidden[span.first_row : span.end_row], batch.tokens[span.first_row : span.end_row]
        if not span.cuts:
            before = self._rows(span.start - 1, span.start) if self._goes_on(span.start) else rows[:0]
            if not len(before):
                self._base = self._done = span.start
            known = np.concatenate([before, rows[:-1]])
            if len(known):
                self._compute(self._final(known), tokens[len(tokens) - len(known) :], self._done)
            self._done = span.end - 1
        self._save(span.start, rows)

    def propose(self, held: Sequence[int], token: int, count: int) -> list[int]:
        """See ``Drafter``."""
        at = len(held)
        self._done = min(self._done, max(at - 1, 0))
        if not self._has(self._done, at):
            if not self._has(at - 1, at):
                return []
            self._base = self._done = at - 1
        # The newest row may be of a position whose memory lies beyond the last that there is.
        count = min(count, self._store.capacity - (at - self._base))
        tokens = np.array([*held[self._done + 1 :], token], np.int64)
        self._compute(self._final(self._rows(self._done, at)), tokens, self._done)
        self._done = at
        guesses = [self._best()] if count > 0 else []
        while len(guesses) < count:
            last = np.array(guesses[-1:], np.int64)
            self._buffers.rows("draft", 1, self._context.spec.hidden)[:] = self._normed
            self._compute(1, last, at + len(guesses) - 1)
            guesses.append(self._best())
        return guesses

    # ---- hidden states -----------------------------------------------------------------------------------

    def _has(self, begin: int, end: int) -> bool:
        """Whether the hidden states of positions begin..end-1 are kept."""
        return self._saved_start <= begin < end <= self._saved_start + len(self._saved)

    def _goes_on(self, start: int) -> bool:
        """Whether all before a span that begins at start is known."""
        self._done = min(self._done, max(start - 1, 0))
        return start > 0 and self._done == start - 1 and self._has(start - 1, start)

    def _rows(self, begin: int, end: int) -> FloatArray:
        return self._saved[begin - self._saved_start : end - self._saved_start]

    def _save(self, start: int, rows: FloatArray) -> None:
        """Keeps the last rows of a pass and some before it."""
        begin = max(self._saved_start, start - KEPT_ROWS)
        before = self._rows(begin, start) if self._has(begin, start) else rows[:0]
        taken = rows[-KEPT_ROWS:]
        if len(taken) < len(rows):
            before = rows[:0]
        self._saved = np.concatenate([before, taken])
        self._saved_start = start + len(rows) - len(self._saved)

    # ---- the layer ---------------------------------------------------------------------------------------

    def _final(self, rows: FloatArray) -> int:
        """Hidden states behind the model's final norm, in the buffer ``draft``; how many."""
        out = self._buffers.rows("draft", len(rows), self._context.spec.hidden)
        out[:] = rows
        self._live().rms_norm(out, self._weights.final_norm, self._context.spec.norm.eps, out)
        return len(rows)

    def _compute(self, num: int, tokens: Sequence[int] | np.ndarray, at: int) -> None:
        """The layer's output of so many rows of ``draft``, whose tokens follow those of positions at.., in
        ``_normed`` that of the last.
        """
        ids, kernels = np.asarray(tokens, np.int64), self._live()
        hidden = self._context.spec.hidden
        self._weights.embedding.rows_into(ids, self._buffers.rows("draft_embedding", num, hidden))
        batch = one_sequence(ids, at - self._base, "none", self._slot)
        self._store.begin(batch)
        for tables in self._ropes.values():
            tables.ensure(batch.spans[0].end)
        self._spans.set(batch.spans, {self._slot: self._memory})
        if num > 1 + MAX_DRAFTS:
            self._run(kernels, num)
        else:
            if num not in self._programs:
                self._programs[num] = Program("draft")
                self._run(Kernels(kernels.pool, self._programs[num]), num)
            self._programs[num].run()
        self._store.advance(batch.spans)

    def _run(self, kernels: Kernels, num: int) -> None:
        """The calls of ``_compute``, made or kept."""
        buffers, spec, layer = self._buffers, self._context.spec, self._layer
        rows = buffers.rows("draft", num, spec.hidden)
        embedding = buffers.rows("draft_embedding", num, spec.hidden)
        both = buffers.rows("draft_input", num, 2 * spec.hidden)
        acts = buffers.acts(num, 2 * spec.hidden)
        kernels.rms_norm(embedding, layer.vector("draft.embedding_norm"), spec.norm.eps, embedding)
        kernels.rms_norm(rows, layer.vector("draft.hidden_norm"), spec.norm.eps, rows)
        kernels.step("inputs side by side", functools.partial(_put_beside, both, embedding, rows))
        kernels.quantize(both, acts)
        projection = layer.int8("draft.projection")
        kernels.gemm_int8_rows(acts, projection.codes, projection.scales, rows)
        for block in self._blocks:
            block.run(kernels, Rows(num, self._spans, rows))
        kernels.rms_norm(rows[-1:], layer.vector("draft.norm"), spec.norm.eps, self._normed)

    def _best(self) -> int:
        """The likeliest token behind ``_normed``."""
        kernels, head = self._live(), self._weights.lm_head
        acts = self._buffers.acts(1, self._context.spec.hidden)
        kernels.quantize(self._normed, acts)
        kernels.gemm_int8_rows(acts, head.codes, head.scales, self.logits)
        return int(np.argmax(self.logits[0, : self._context.spec.vocab]))

    def _live(self) -> Kernels:
        if self._kernels is None:
            raise NativeError("drafting was not started", where="draft")
        return self._kernels


def _put_beside(both: FloatArray, embedding: FloatArray, rows: FloatArray) -> None:
    hidden = rows.shape[1]
    both[:, :hidden], both[:, hidden:] = embedding, rows


def _cache(store: KvStore, index: int) -> LayerCache | None:
    place = store.places[index]
    if place is None:
        return None
    return LayerCache(place.offset_bytes, place.value_offset_bytes, place.rows, store.dtype)
