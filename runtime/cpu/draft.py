"""The layer for multi-token prediction on the CPU: guesses tokens from the model's last hidden states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.drafting import draft_alone
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.batch import Batch, TokenIds, one_sequence
from krasis.runtime.cpu.blocks import Block, CpuContext, FloatArray, Rows, cpu_block
from krasis.runtime.cpu.followed import KEPT_ROWS, Followed
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import aligned_empty
from krasis.runtime.cpu.program import Program
from krasis.runtime.cpu.rope import tables_of
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans
from krasis.runtime.cpu.weights import LayerWeights, ModelWeights
from krasis.runtime.settings import MAX_DRAFTS
from krasis.runtime.state.kv_store import KvStore


def draft_spec(spec: ModelSpec, weights: LayerWeights) -> ModelSpec:
    """The drafting layer as a model of its own."""
    return draft_alone(spec, weights.layer)


class CpuDraft:
    """See ``drafting.Drafter``. Of position p it computes, from the model's hidden state there and the token
    of p + 1, what the token of p + 2 may be; it has keys and values of its own, of each of the model's slots.

    Prompts it computes behind their passes; of tokens that come one at a time it keeps the hidden states, and
    computes them when it guesses, or KEPT_ROWS of them together: which is cheap where nobody asks it.

    Where hidden states are missing (behind a saved prefix) it goes on from there: it then sees less, and
    guesses worse. Its memory's positions count from where it began. logits: float32 [1, >= vocab], by which
    the last guess was made.
    """

    def __init__(self, context: CpuContext, weights: ModelWeights, store: KvStore, count: int) -> None:
        """context: of the model, whose buffers it shares and which are not made yet. store: of
        ``draft_spec``, for itself, with as many slots as the model's.
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
        opened = [store.open() for _ in range(store.num_slots)]  # pages come as positions are written
        self._memory = {slot: SlotMemory(*store.memory(slot)) for slot in opened}
        self._followed = {slot: Followed(slot, hidden) for slot in opened}
        self._spans = Spans(1, store.keys_bytes, store.values_bytes)
        self._normed = aligned_empty((1, hidden), np.float32)
        self.logits = aligned_empty((1, weights.lm_head.num_rows), np.float32)
        self._kernels: Kernels | None = None
        self._programs: dict[int, Program] = {}

    def start(self, kernels: Kernels) -> None:
        """Before the first pass: what runs native calls."""
        self._kernels = kernels

    def forget(self, slot: int = 0) -> None:
        """See ``Drafter``."""
        self._followed[slot].forget()

    def follow(self, batch: Batch, hidden: FloatArray, *, computes: bool = True) -> None:
        """After a pass: hidden float32 [T, hidden], what the last layer left of its rows. computes: False
        between the layers of another pass, whose buffers are not to be touched."""
        for span in batch.spans:
            one = self._followed[span.slot]
            one.go_back(span.start)
            one.add(hidden[span.first_row : span.end_row], batch.tokens[span.first_row : span.end_row])
            is_due = span.rows > 1 or one.end - 1 - one.done >= KEPT_ROWS
            if computes and is_due and not span.cuts:
                self._compute_to(one, one.end - 1, one.tokens_of(one.done + 1, one.end))
            one.drop()

    def propose(self, held: Sequence[int] | TokenIds, token: int, count: int, slot: int = 0) -> list[int]:
        """See ``Drafter``."""
        one, at = self._followed[slot], len(held)
        one.go_back(at)
        if not one.has(at - 1, at):
            return []
        # The newest row may be of a position whose memory lies beyond the last that there is.
        count = min(count, self._store.capacity - (at - one.base))
        self._compute_to(one, at, np.append(one.tokens_of(one.done + 1, at), token))
        guesses = [self._best()] if count > 0 else []
        while len(guesses) < count:
            last = np.array(guesses[-1:], np.int64)
            self._buffers.rows("draft", 1, self._context.spec.hidden)[:] = self._normed
            self._compute(one, last, at + len(guesses) - 1)
            guesses.append(self._best())
        return guesses

    # ---- the layer ---------------------------------------------------------------------------------------

    def _compute_to(self, one: Followed, end: int, tokens: TokenIds) -> None:
        """The memory of what is known before a position; tokens: those that follow."""
        most, begin = self._buffers.max_rows, one.done
        while one.done < end:
            stop = min(one.done + most, end)
            self._final(one.rows_of(one.done, stop))
            self._compute(one, tokens[one.done - begin : stop - begin], one.done)
            one.done = stop

    def _final(self, rows: FloatArray) -> None:
        """Hidden states behind the model's final norm, in the buffer ``draft``."""
        out = self._buffers.rows("draft", len(rows), self._context.spec.hidden)
        out[:] = rows
        self._live().rms_norm(out, self._weights.final_norm, self._context.spec.norm.eps, out)

    def _compute(self, one: Followed, ids: TokenIds, at: int) -> None:
        """The layer's output of rows of ``draft``, whose tokens ids follow those of positions at.., in
        ``_normed`` that of the last.
        """
        num, kernels = len(ids), self._live()
        hidden = self._context.spec.hidden
        self._weights.embedding.rows_into(ids, self._buffers.rows("draft_embedding", num, hidden))
        batch = one_sequence(ids, at - one.base, "none", one.slot)
        self._store.begin(batch)
        for tables in self._ropes.values():
            tables.ensure(batch.spans[0].end)
        self._spans.set(batch.spans, self._memory)
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
