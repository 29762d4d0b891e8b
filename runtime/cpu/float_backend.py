"""A model in float32 on dequantised weights, in NumPy: slow, for measuring what quantisation costs.

It runs any tier: the CPU's tiles, or the Marlin experts that a GPU would run. Weights are unpacked when they
are used and kept while a bounded cache has room.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.runtime import reference
from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Batch, Logits, TokenIds, one_sequence
from krasis.runtime.cpu.factors import cap_logits, without_factors
from krasis.runtime.cpu.float_blocks import (
    FloatContext,
    UnpackedCache,
)
from krasis.runtime.cpu.float_streams import LayerPart, float_end, float_layer, has_experts
from krasis.runtime.cpu.hashed_table import hashed_tables
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.rope import tables_of
from krasis.runtime.cpu.weights import ModelWeights
from krasis.runtime.settings import EngineSettings
from krasis.runtime.state.hybrid_store import state_store

FloatArray = npt.NDArray[np.float32]
# Called with layer, expert, what gate and up multiply [tokens, hidden], what down multiplies [tokens, I].
LayerObserver = Callable[[int, int, Array, Array], None]
Text = tuple[TokenIds, FloatArray]  # ids, and the residual of their rows
CACHE_BYTES = 2**30
TOKENS_AT_ONCE = 4096


class FloatBackend:
    """See ``backend.Backend``."""

    def __init__(self, weights: ModelWeights, settings: EngineSettings) -> None:
        weights = without_factors(weights)
        self.spec = weights.spec
        self.layer_done: LayerProgress | None = None
        self.capacity = settings.context_for(self.spec.max_context)
        self.prefill_chunk = settings.cpu_chunk_for(self.capacity)
        self.kv_dtype, self.placement = settings.kv_dtype, ("NumPy", "NumPy")
        self.state = state_store(self.spec, self.capacity, settings.kv_dtype, settings.slots)
        self._weights: ModelWeights | None = weights
        context = FloatContext(
            spec=self.spec,
            layout=weights.expert_layout,
            store=self.state,
            ropes=tables_of(self.spec, self.capacity),
            unpacked=UnpackedCache(CACHE_BYTES),
        )
        self._context = context
        self._picked: dict[int, npt.NDArray[np.bool_]] = {}  # by windows that are observed
        self._tables = hashed_tables(weights, self.state)
        self._streams = 1 if self.spec.residual is None else self.spec.residual.streams
        self._layers = [
            list(float_layer(context, self._tables, index, layer))
            for index, layer in enumerate(weights.layers)
        ]
        self.description = (
            f"NumPy float32 reference, {weights.expert_layout.layout_id} experts of the {settings.experts} "
            f"tier, {settings.kv_dtype} KV cache of {self.capacity} tokens"
        )

    def run(self, batch: Batch) -> Logits:
        """See ``backend.Backend``."""
        weights = self._live_weights()
        self.state.begin(batch)
        before, outer = self._tables.begin(batch), self._context.current.begin(batch)
        hidden = np.tile(weights.embedding.rows(batch.tokens), self._streams)
        try:
            for index, blocks in enumerate(self._layers):
                for block in blocks:
                    hidden += block.run(hidden, batch.spans)
                if self.layer_done is not None:
                    self.layer_done(index + 1, len(self._layers))
        finally:
            self._tables.end(before)
            self._context.current.end(outer)
        self.state.advance(batch.spans)
        normed = float_end(self._context, weights, hidden[batch.wanted_rows()])
        logits = reference.gemm(normed, self._context.int8("lm_head", weights.lm_head))[:, : self.spec.vocab]
        cap_logits(logits, self.spec.logits_cap)
        return logits

    def observe_experts(self, windows: Sequence[TokenIds], observe: LayerObserver) -> None:
        """Runs texts of at most ``capacity`` tokens, each from an empty context, and shows what experts get.

        All windows pass a layer before the next: weights are unpacked once for many tokens. observe: called
        with the layer and what ``reference.ExpertObserver`` gets, several times for an expert. The first
        slot's contents are lost.
        """
        slot = self.state.open()
        embedding = self._live_weights().embedding
        texts = [(tokens, np.tile(embedding.rows(tokens), self._streams)) for tokens in windows]
        for index, blocks in enumerate(self._layers):
            see = functools.partial(observe, index)
            for group in _groups(texts, TOKENS_AT_ONCE):
                self._observe_group(blocks, group, slot, see)
        self._picked.clear()
        self.state.close(slot)

    def _observe_group(
        self, blocks: Sequence[LayerPart], group: list[Text], slot: int, see: reference.ExpertObserver
    ) -> None:
        ends = np.cumsum([len(tokens) for tokens, _ in group])[:-1]
        for block in blocks:
            if has_experts(block):
                self._context.current.tokens = np.concatenate([tokens for tokens, _ in group])
                added = block.run(np.concatenate([rows for _, rows in group]), (), see)
                parts = np.split(added, ends)
            else:
                parts = [self._mixed(block, text, slot) for text in group]
            for (_, rows), part in zip(group, parts, strict=True):
                np.add(rows, part, out=rows)

    def _mixed(self, block: LayerPart, text: Text, slot: int) -> FloatArray:
        """What a block adds to a window, which finds what an index picked for it in a layer before."""
        tokens, rows = text
        chosen, window = self._context.chosen, id(rows)
        if window in self._picked:
            chosen[slot] = self._picked[window]
        batch = one_sequence(tokens, 0, "none", slot)
        before = self._tables.begin(batch)
        try:
            added = block.run(rows, batch.spans)
        finally:
            self._tables.end(before)
        if slot in chosen:
            self._picked[window] = chosen[slot]
        return added

    def close(self) -> None:
        """See ``backend.Backend``."""
        self._weights = None
        self._context.unpacked.clear()

    def _live_weights(self) -> ModelWeights:
        if self._weights is None:
            raise NativeError("the engine is closed")
        return self._weights


def _groups(texts: Sequence[Text], most_rows: int) -> Iterator[list[Text]]:
    """Texts in order, together of at most most_rows rows, but at least one."""
    group: list[Text] = []
    for text in texts:
        if group and sum(len(tokens) for tokens, _ in group) + len(text[0]) > most_rows:
            yield group
            group = []
        group.append(text)
    if group:
        yield group
