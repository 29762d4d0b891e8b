"""A model on the CPU: INT8 dense weights, tiled experts, int8 activations, native kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.native import Pool
from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Batch, Logits
from krasis.runtime.cpu.blocks import Block, CpuContext, Rows
from krasis.runtime.cpu.buffers import Buffers
from krasis.runtime.cpu.current import CurrentRows
from krasis.runtime.cpu.delta_kernels import DeltaPlace
from krasis.runtime.cpu.draft import CpuDraft, draft_spec
from krasis.runtime.cpu.factors import cap_logits, without_factors
from krasis.runtime.cpu.hashed_table import hashed_tables
from krasis.runtime.cpu.heads import Heads
from krasis.runtime.cpu.index import CHOSEN, index_workspace_bytes
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array, aligned_empty
from krasis.runtime.cpu.program import NativeFunction, Program
from krasis.runtime.cpu.rope import tables_of
from krasis.runtime.cpu.spans import LayerCache, Rounds, RowByRow, SlotMemory, Spans
from krasis.runtime.cpu.streams import CpuEnd, cpu_layer
from krasis.runtime.cpu.weights import ModelWeights
from krasis.runtime.cpu.workspaces import attention_workspace_bytes, moe_workspace_bytes, workspace
from krasis.runtime.settings import MAX_DRAFTS, EngineSettings
from krasis.runtime.state.hybrid_store import HybridStore, state_store
from krasis.runtime.state.kv_store import KvStore

LOGIT_ROWS = 64  # tokens whose logits are computed at once when more are wanted
PROGRAM_ROWS = 32  # most sequences whose next tokens are computed by a program kept for their number


class CpuBackend:
    """See ``backend.Backend``. Opening maps weights and reserves buffers; nothing of the weights is read.

    n sequences in one batch get each the bits of a batch of its own. While a batch of several rows a sequence
    is computed, ``layer_done`` may run one of single rows of other sequences. drafter: where the weights have
    a layer that drafts, and settings.draft is not 0.
    """

    decodes_between_layers = True

    def __init__(self, weights: ModelWeights, settings: EngineSettings) -> None:
        weights = without_factors(weights)
        spec, layout = weights.spec, weights.expert_layout
        self.spec = spec
        self.layer_done: LayerProgress | None = None
        self._is_passing = False
        self.capacity = settings.context_for(spec.max_context)
        self.prefill_chunk = settings.cpu_chunk_for(self.capacity)
        tiles = layout.tiles
        if tiles is None:
            raise NativeError("the CPU kernels run CPU tiles only", got=layout.layout_id)
        self.kv_dtype, self.placement = settings.kv_dtype, ("CPU", "CPU")
        # Refuses a context that RAM cannot hold.
        self.state = state_store(spec, self.capacity, settings.kv_dtype, settings.slots)
        self._weights: ModelWeights | None = weights
        self._memory: dict[int, SlotMemory] = {}
        most_rows = max(self.prefill_chunk, min(settings.slots, PROGRAM_ROWS), 1 + (settings.draft or 0))
        self._buffers = Buffers(most_rows)
        self._ropes = tables_of(spec, self.capacity)
        self._current = CurrentRows()
        context = self._new_context(tiles)
        self.drafter = self._new_drafter(weights, settings, context)
        self._buffers.reserve("hidden", spec.residual_width)
        self._buffers.reserve_acts(spec.hidden)
        self._tables = hashed_tables(weights, self.state)
        self._layers: list[list[Block]] = [
            cpu_layer(context, self._tables, index, layer) for index, layer in enumerate(weights.layers)
        ]
        self._end = CpuEnd(weights, self._buffers)
        self._buffers.make()
        self._logits = aligned_empty((LOGIT_ROWS, weights.lm_head.num_rows), np.float32)
        self._pool = Pool(settings.threads, settings.isa)
        self._kernels = Kernels(self._pool)
        if self.drafter is not None:
            self.drafter.start(self._kernels)
        self._spans = self._new_spans(settings.slots)
        self._programs: dict[tuple[int, bool], tuple[Program, Spans]] = {}
        self._program_of(1, chooses=False)
        self._cut_programs: dict[tuple[int, bool], tuple[Program, RowByRow]] = {}
        self._trail: dict[int, tuple[Array, Array]] = {}  # see ``Rows``
        self.description = (
            f"CPU, {self._pool.isa} kernels ({settings.isa} asked for), {self._pool.num_threads} threads, "
            f"{layout.layout_id} experts, int8 activations, "
            f"{settings.kv_dtype} KV cache of {self.capacity} tokens"
        )

    def _new_context(self, tiles: str) -> CpuContext:
        return CpuContext(
            spec=self.spec,
            tiles=tiles,
            ropes=self._ropes,
            caches=_caches(self.state),
            buffers=self._buffers,
            fixed=_fixed(self.state),
            fixed_begin=self.state.fixed_offset_bytes if isinstance(self.state, HybridStore) else 0,
            store=self.state,
            current=self._current,
            scratch=workspace(_workspace_bytes(self.spec, self._buffers.max_rows, self.state)),
        )

    def _new_drafter(
        self, weights: ModelWeights, settings: EngineSettings, context: CpuContext
    ) -> CpuDraft | None:
        if weights.draft is None or not settings.draft:
            return None
        own = KvStore(draft_spec(self.spec, weights.draft), self.capacity, settings.kv_dtype, settings.slots)
        return CpuDraft(context, weights, own, settings.draft)

    def run(self, batch: Batch) -> Logits:
        """See ``backend.Backend``."""
        weights = self._live_weights()
        self.state.begin(batch)
        for tables in self._ropes.values():
            tables.ensure(max(span.end for span in batch.spans))
        num_rows = len(batch.tokens)
        hidden = self._hidden(num_rows)
        # All that a pass has in the buffers from one layer to the next.
        kept = self._kept(hidden) if self._is_passing else []
        outer, current = self._tables.begin(batch), self._current.begin(batch)
        weights.embedding.rows_into(batch.tokens, hidden[:, : self.spec.hidden])
        for stream in range(self.spec.hidden, self.spec.residual_width, self.spec.hidden):
            hidden[:, stream : stream + self.spec.hidden] = hidden[:, : self.spec.hidden]
        slots = {span.slot: self._slot_memory(span.slot) for span in batch.spans}
        try:
            if num_rows == len(batch.spans) <= PROGRAM_ROWS:
                program, spans = self._program_of(num_rows, chooses=self._chooses(batch))
                spans.set(batch.spans, slots)
                program.run()
            elif len(batch.spans) == 1 and batch.spans[0].cuts and num_rows <= 1 + MAX_DRAFTS:
                program, by_row = self._cut_program_of(num_rows, chooses=self._chooses(batch))
                by_row.set(batch.spans[0], slots)
                self._set_trail(batch)
                program.run()
            else:
                self._pass(batch, slots, hidden)
        finally:
            self._tables.end(outer)
            self._current.end(current)
        self.state.advance(batch.spans)
        logits = self._logits_of(hidden, batch)
        if self.drafter is not None:
            self.drafter.follow(batch, hidden, computes=not self._is_passing)
        for rows, before in kept:
            rows[:] = before
        return logits

    def watch(self, wrap: Callable[[str, NativeFunction], NativeFunction]) -> None:
        """Every native call goes through wrap(name, function): for profiles."""
        self._kernels.watch(wrap)
        for program, _ in (*self._programs.values(), *self._cut_programs.values()):
            program.watch(wrap)

    def close(self) -> None:
        """See ``backend.Backend``."""
        self._weights = None
        self._pool.close()

    def _pass(self, batch: Batch, slots: dict[int, SlotMemory], hidden: Array) -> None:
        """The layers of a batch that no program is kept for."""
        if self._is_passing:
            raise NativeError("only single rows of sequences can be computed between the layers of a batch")
        self._spans.set(batch.spans, slots)
        self._is_passing = True
        try:
            rounds = Rounds(self._spans, batch.spans, slots)
            self._set_trail(batch)
            chooses, trail = self._chooses(batch), self._trail or None
            rows = Rows(len(batch.tokens), self._spans, hidden, rounds, chooses, trail=trail)
            self._run_layers(self._kernels, rows, self.layer_done)
        finally:
            self._is_passing = False

    def _set_trail(self, batch: Batch) -> None:
        """Notes for rows that can be gone back to what of their slot is copied, and where to."""
        self._trail.clear()
        if not isinstance(self.state, HybridStore) or not self.state.fixed_bytes:
            return
        for span in batch.spans:
            if span.cuts:
                fixed, copies = self.state.trail(span)
                self._trail |= {span.first_row + row: (fixed, copy) for row, copy in enumerate(copies)}

    def _run_layers(self, kernels: Kernels, rows: Rows, layer_done: LayerProgress | None = None) -> None:
        """From the embedding to the last layer's output, both in rows.hidden."""
        for index, blocks in enumerate(self._layers):
            for block in blocks:
                block.run(kernels, rows)
            if layer_done is not None:
                layer_done(index + 1, len(self._layers))

    def _chooses(self, batch: Batch) -> bool:
        """Whether some row sees more than an index picks."""
        most = self.spec.densest_context
        return most is not None and any(span.end > most for span in batch.spans)

    def _kept(self, hidden: Array) -> list[tuple[Array, Array]]:
        """What a pass has in the rows of hidden from one layer to the next, and a copy of it."""
        both = [hidden]
        if (chosen := self._buffers.rows_if_any(CHOSEN, len(hidden))) is not None:
            both.append(chosen)
        return [(rows, rows.copy()) for rows in both]

    def _program_of(self, num_rows: int, *, chooses: bool) -> tuple[Program, Spans]:
        """The calls of one token of each of num_rows sequences, and what tells them where these are. chooses:
        see ``Rows``."""
        found = self._programs.get((num_rows, chooses))
        if found is None:
            program, spans = Program(), self._new_spans(num_rows)
            rows = Rows(num_rows, spans, self._hidden(num_rows), chooses=chooses)
            self._run_layers(Kernels(self._pool, program), rows)
            found = self._programs[num_rows, chooses] = program, spans
        return found

    def _hidden(self, num_rows: int) -> Array:
        """The residual of rows, [num_rows, channels of all its streams]."""
        return self._buffers.rows("hidden", num_rows, self.spec.residual_width)

    def _cut_program_of(self, num_rows: int, *, chooses: bool) -> tuple[Program, RowByRow]:
        """The calls of rows of one sequence that can be gone back to."""
        found = self._cut_programs.get((num_rows, chooses))
        if found is None:
            program = Program()
            by_row = RowByRow(num_rows, self.state.keys_bytes, self.state.values_bytes)
            hidden = self._hidden(num_rows)
            trail = self._trail if isinstance(self.state, HybridStore) else None
            rows = Rows(num_rows, by_row.whole, hidden, by_row, chooses, trail=trail)
            self._run_layers(Kernels(self._pool, program), rows)
            found = self._cut_programs[num_rows, chooses] = program, by_row
        return found

    def _new_spans(self, max_spans: int) -> Spans:
        return Spans(max_spans, self.state.keys_bytes, self.state.values_bytes)

    def _slot_memory(self, slot: int) -> SlotMemory:
        found = self._memory.get(slot)
        if found is None:
            found = self._memory[slot] = SlotMemory(*self.state.memory(slot))
        return found

    def _logits_of(self, hidden: Array, batch: Batch) -> Logits:
        """[num_logits, vocab]: few in a buffer that the next call overwrites, many in a new array."""
        wanted = batch.wanted_rows()
        vocab = self.spec.vocab
        if len(wanted) <= LOGIT_ROWS:
            return self._head(hidden, wanted)[:, :vocab]
        result = np.empty((len(wanted), vocab), dtype=np.float32)
        for begin in range(0, len(wanted), LOGIT_ROWS):
            some = wanted[begin : begin + LOGIT_ROWS]
            result[begin : begin + len(some)] = self._head(hidden, some)[:, :vocab]
        return result

    def _head(self, hidden: Array, wanted: list[int]) -> Logits:
        """[len(wanted), padded vocab] of some rows."""
        weights, out = self._live_weights(), self._logits[: len(wanted)]
        if not wanted:
            return out
        is_run = wanted[-1] - wanted[0] + 1 == len(wanted)
        rows = hidden[wanted[0] : wanted[-1] + 1] if is_run else hidden[wanted]
        acts = self._buffers.acts(len(wanted), self.spec.hidden)
        self._end.read(self._kernels, rows, acts)
        self._kernels.gemm_int8_rows(acts, weights.lm_head.codes, weights.lm_head.scales, out)
        cap_logits(out, self.spec.logits_cap)
        return out

    def _live_weights(self) -> ModelWeights:
        if self._weights is None:
            raise NativeError("the engine is closed")
        return self._weights


def _caches(store: KvStore) -> tuple[LayerCache | None, ...]:
    """Where the kernels find each layer's keys and values in a slot."""
    return tuple(
        None
        if p is None
        else LayerCache(p.offset_bytes, p.value_offset_bytes, p.rows, store.dtype, p.rows < store.capacity)
        for p in store.places
    )


def _fixed(store: KvStore) -> tuple[DeltaPlace | None, ...]:
    """Where the kernels find each layer's matrices in a slot."""
    if not isinstance(store, HybridStore):
        return (None,) * len(store.places)
    begin = store.fixed_offset_bytes
    return tuple(
        None
        if place is None
        else DeltaPlace(
            begin + place.offset_bytes,
            begin + place.offset_bytes + place.columns_bytes,
            begin + place.offset_bytes + place.num_bytes,
        )
        for place in store.recurrent
    )


def _workspace_bytes(spec: ModelSpec, num_rows: int, store: KvStore) -> int:
    """What attention, what chooses its keys, and experts need at most; they take turns."""
    needs, capacity = [0], store.capacity
    for layer in dict.fromkeys(spec.layers):
        mixer, experts = layer.mixer, layer.experts
        if isinstance(mixer, Attention):
            heads = Heads(mixer.heads, mixer.kv_heads, mixer.head_dim)
            needs.append(attention_workspace_bytes(num_rows, capacity, heads))
        elif isinstance(mixer, LatentAttention):
            heads = Heads(mixer.heads, 1, mixer.kv_rank + mixer.rope_dim)
            needs.append(attention_workspace_bytes(num_rows, capacity, heads))
            if spec.densest_context is not None and capacity > spec.densest_context:
                needs.append(index_workspace_bytes(mixer, num_rows, capacity, store.dtype))
        if experts is not None:
            sizes = (experts.width(spec.hidden), experts.intermediate, experts.count, experts.router.top_k)
            needs.append(moe_workspace_bytes(num_rows, *sizes))
    return max(needs)
