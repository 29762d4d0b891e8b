"""A token of each of a few sequences on GPU and CPU together: dense layers, attention and resident experts on
the GPU, the other experts on the CPU, in one captured graph that hands over once a layer each way.

While the CPU computes its experts of a layer, the GPU computes its own of the same layer; then it adds both.
If every expert is resident there is no hand-over at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from krasis.formats.errors import NativeError, UsageError
from krasis.formats.process.stages import stage
from krasis.runtime.backend import Logits
from krasis.runtime.device.api import Graph, Stream
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.streams import GpuEnd
from krasis.runtime.gpu.blocks.table import Blocks, blocks_of
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.decode_rows import DecodeRows
from krasis.runtime.gpu.decode_split import Split
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.experts.host_experts import CpuTier, HostExperts
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.head import cap_logits
from krasis.runtime.gpu.kernels.moe import MAX_ROUTER_TOKENS
from krasis.runtime.gpu.kernels.named_slots import COLUMNS
from krasis.runtime.gpu.kv_ahead import KvAhead
from krasis.runtime.gpu.looked_up import LookedUp
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.row_tables import RowTables

TIMEOUT_S = 20.0
MAX_ROWS = MAX_ROUTER_TOKENS
"""Tokens of one call."""


@dataclass(frozen=True, slots=True)
class Next:
    """The next token of a sequence: at a position of its slot."""

    token: int
    position: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graph of so many rows; host: the CPU's side of it, None if every expert is resident. ranks: whether
    other ranks take part."""

    graph: Graph
    host: HostExperts | None
    ranks: RankLink | None


class HybridDecoder:
    """Decodes token after token of the sequences whose keys and values lie in ``model.cache``.

    cpu: may be None only if every expert is resident. residency: None if no expert ever is. timeout_s: how
    long one side waits for the other in a layer before the token fails. max_rows: sequences at once. ranks:
    other ranks, which compute the experts they hold of tokens while the link is open.
    """

    def __init__(
        self,
        model: GpuModel,
        product: ExpertProduct,
        cpu: CpuTier | None,
        residency: Residency | None,
        timeout_s: float = TIMEOUT_S,
        *,
        blocks: Blocks | None = None,
        max_rows: int = 1,
        ranks: RankLink | None = None,
    ) -> None:
        """Raises UsageError without CPU experts unless all are resident, and OutOfDeviceMemoryError."""
        shape, device = model.shape, model.device
        self._model, self._product, self._residency = model, product, residency
        self._blocks = blocks_of(model) if blocks is None else blocks
        self.max_rows = min(max_rows, MAX_ROWS)
        routers = [block for part in self._blocks for block in part if isinstance(block, GpuExperts)]
        self._routed = sum(block.top_k for block in routers)  # slots of a token
        is_complete = residency is not None and residency.is_complete
        self._ranks = ranks
        self.decodes_alone = cpu is not None or is_complete
        if not self.decodes_alone and not (ranks is not None and ranks.is_complete):
            raise UsageError(
                "decode needs CPU experts, or all experts in VRAM",
                hint="convert with both tiers (krasis-convert --tiers gpu,cpu), or decode through prefill",
            )
        self._cpu = None if is_complete else cpu
        self._handover: Handover | None = None
        self._host: HostExperts | None = None  # of one row
        if self._cpu is not None:
            self._handover = Handover(device, model.kernels, model.spec, timeout_s, self.max_rows)
            self._host = HostExperts(self._handover, self._cpu, model.spec)
        self._workspace = Workspace(device, model.spec, model.dtype, self.max_rows, 1, windows=False)
        choices = (self.max_rows, shape.num_experts_per_token)
        self._gpu_ids = device.empty(choices, torch.int32)
        self._cpu_ids = device.empty(choices, torch.int32)
        self._tables = RowTables(device, model.cache, self.max_rows)
        self._looked_up, self._end = LookedUp(model, self.max_rows), GpuEnd(model)
        self._executed = device.empty((1,), torch.int64)
        self._fetched = device.flags(1)  # that nobody waits for
        self._attention = device.empty((self._attention_bytes(),), torch.uint8)
        self._arrivals = device.empty((2 + shape.expert_width // COLUMNS,), torch.int32)
        model.kernels.fill(model.stream, self._arrivals)
        self._host_rows = device.pinned((self.max_rows, shape.hidden_size), torch.float32)
        self._host_executed = device.pinned((1,), torch.int64)
        logits = self._workspace.view(self.max_rows).logits
        self._host_logits = device.pinned(logits.shape, torch.float32)
        self._captured: dict[tuple[int, bool, bool, bool], _Captured] = {}
        self._split = Split()
        self._sums = np.zeros(len(asdict(self._split)))
        self._num_tokens = 0

    def _attention_bytes(self) -> int:
        """Of the layer that needs the most."""
        model = self._model
        parts = (part for part in model.cache.parts if part is not None)
        # Latent attention has a buffer.
        sizes = {part.head_dim for part in parts if not part.is_latent}
        most_heads = [model.shape.attention_size // dim for dim in sizes]
        return (
            max(
                model.kernels.attention_workspace_bytes(self.max_rows, count, dim, model.cache.capacity)
                for count, dim in zip(most_heads, sizes, strict=True)
            )
            if sizes
            else 0
        )

    @property
    def description(self) -> str:
        """A few words for logs."""
        if self._ranks is not None:
            held = "all experts resident" if self._ranks.is_complete else "CPU experts"
            return f"{self._ranks.num_ranks} GPUs + {held}"
        if self._handover is None:
            return "GPU, all experts resident"
        if self._residency is None:
            return "GPU + CPU experts"
        return f"GPU + CPU experts, {self._residency.num_slots} experts resident"

    @property
    def last_split(self) -> dict[str, float]:
        """``Split`` of the last token."""
        return asdict(self._split)

    def mean_split(self) -> dict[str, float]:
        """Means over the tokens since ``reset_split``, and their number as num_tokens."""
        means = self._sums / max(self._num_tokens, 1)
        return {
            **dict(zip(asdict(self._split), means.tolist(), strict=True)),
            "num_tokens": self._num_tokens,
        }

    def reset_split(self) -> None:
        """Begins new means."""
        self._sums[:] = 0
        self._num_tokens = 0

    def decode(self, token: int, position: int) -> Logits:
        """Logits [vocab] of the token at a position of slot 0; see ``decode_rows``."""
        logits: Logits = self.decode_rows([Next(token, position)])[0]
        return logits

    def decode_rows(self, rows: Sequence[Next]) -> Logits:
        """Logits [rows, vocab] of a token of each of up to max_rows sequences, a view that the next call
        overwrites.

        Raises NativeError if a routed expert was left out, or if one side waited in vain (naming the layer);
        the next call begins afresh.
        """
        self._set_inputs(rows)
        self._model.cache.settle(self._model.stream)
        if self._residency is not None:
            self._residency.prepare(self._model.stream)
        ranks = self._ranks if self._ranks is not None and self._ranks.is_open else None
        if ranks is None and not self.decodes_alone:
            raise NativeError("the other ranks have the experts", where="decode")
        try:
            if ranks is not None:
                ranks.prepare(self._model.stream)
            chooses = self._chooses(rows)
            key = (len(rows), ranks is not None, self._reads_ahead(len(rows), ranks), chooses)
            captured = self._captured.get(key)
            if captured is None:
                with stage("capture the graph of decode"):
                    captured = self._capture(len(rows), ranks, chooses)
                self._captured[key] = captured
            self._run(captured, len(rows))
        except BaseException:  # also Ctrl-C: the GPU may wait for answers that nobody will give
            self._recover()
            raise
        if self._residency is not None:
            self._residency.after_token(self._model.stream)
        logits: Logits = self._host_logits.numpy()[: len(rows), : self._model.spec.vocab]
        return logits

    def close(self) -> None:
        """Waits for the GPU. Calling it again does nothing."""
        self._captured.clear()
        self._model.stream.synchronize()

    # ---- one token -----------------------------------------------------------------------------------------

    def _set_inputs(self, rows: Sequence[Next]) -> None:
        if not 1 <= len(rows) <= self.max_rows:
            raise NativeError(
                "too many sequences at once", where="decode", got=len(rows), limit=self.max_rows
            )
        cache = self._model.cache
        for row in rows:
            if not 0 <= row.position < cache.capacity:
                raise NativeError("no such position", where="decode", got=row.position, limit=cache.capacity)
            if not 0 <= row.slot < cache.num_slots:
                raise NativeError("no such slot", where="decode", got=row.slot, limit=cache.num_slots)
        host_rows = self._host_rows[: len(rows)]
        self._model.device.host_writes(host_rows)
        self._model.weights.embedding.rows_into(np.array([row.token for row in rows]), host_rows.numpy())
        self._tables.set([(row.position, row.slot) for row in rows])
        self._looked_up.set([(row.token, row.position, row.slot) for row in rows])

    def _run(self, captured: _Captured, num_rows: int) -> None:
        model, host, ranks = self._model, captured.host, captured.ranks
        handover = None if host is None else self._handover
        began = time.perf_counter()
        if handover is not None:
            handover.epoch.value += 1
        if ranks is not None:
            ranks.begin(num_rows)
        self._name_residents()
        captured.graph.replay(model.stream)
        self._name_residents()
        ended = model.stream.record()
        submitted = time.perf_counter()
        if host is not None:
            model.device.serve(partial(host.run, ended))
        served = time.perf_counter()
        ended.synchronize()
        model.device.host_reads(self._host_logits[:num_rows], self._host_executed)
        if handover is not None:
            handover.check()
        num_cpu = 0 if host is None else host.num_executed
        num_gpu = int(self._host_executed[0]) + (0 if ranks is None else ranks.end())
        self._check_counts(num_cpu, num_gpu, num_rows)
        done = time.perf_counter()
        waited = 0.0 if host is None else host.waiting_s
        self._note(
            Split(
                total_s=done - began,
                submit_s=submitted - began,
                cpu_experts_s=served - submitted - waited,
                wait_gpu_s=waited,
                tail_s=done - served,
                num_cpu_experts=num_cpu,
                num_gpu_experts=num_gpu,
            )
        )

    def _name_residents(self) -> None:
        """Before and after a replay: which slots it reads. The graph cannot say: it is captured once, and
        swaps write other slots while it runs."""
        if self._residency is not None and self._residency.memory_in_use:
            reads = self._residency.memory_in_use
            self._model.stream.launch("residents are read", lambda _: None, reads=reads, writes=())

    def _check_counts(self, num_cpu: int, num_gpu: int, num_rows: int) -> None:
        expected = num_rows * self._routed
        if num_cpu + num_gpu != expected:
            raise NativeError(
                "not every routed expert was executed exactly once",
                where="decode",
                got=f"{num_cpu} on the CPU + {num_gpu} on the GPU",
                limit=expected,
            )

    def _recover(self) -> None:
        """Brings both sides to rest after an error."""
        handover, ranks = self._handover, self._ranks
        if ranks is not None and ranks.is_open:
            ranks.release()
        if handover is not None:
            handover.answer(handover.num_layers)
        self._model.stream.synchronize()
        if handover is not None:
            handover.reset(self._model.stream)

    def _note(self, split: Split) -> None:
        self._split = split
        self._sums += list(asdict(split).values())
        self._num_tokens += 1

    # ---- the graph -----------------------------------------------------------------------------------------

    def _capture(self, num_rows: int, ranks: RankLink | None, chooses: bool) -> _Captured:
        """The graph of a token of so many sequences. The first layers run once before, up to one of each
        kind: CUDA loads a kernel when it is first launched, which it does not like to do while it captures.
        """
        model, handover = self._model, self._handover_with(ranks)
        layers = model.spec.layers
        warm = 1 + max(layers.index(layer) for layer in dict.fromkeys(layers))
        if handover is not None:
            handover.reset(model.stream)
            handover.answer(
                sum(isinstance(block, GpuExperts) for blocks in self._blocks[:warm] for block in blocks)
            )
        with self._tables.of_nobody(num_rows):
            self._submit(model.stream, num_rows, warm, ranks, chooses)
            model.stream.synchronize()
        host = None
        if handover is not None:
            handover.reset(model.stream)
            host = self._host
            if self._cpu is not None and num_rows > 1:
                host = HostExperts(handover, self._cpu, model.spec, num_rows)
        with model.device.capture(model.stream) as graph:
            self._submit(model.stream, num_rows, len(self._blocks), ranks, chooses)
        return _Captured(graph, host, ranks)

    def _handover_with(self, ranks: RankLink | None) -> Handover | None:
        """What the CPU gets of a token in which those ranks take part."""
        return None if ranks is not None and ranks.is_complete else self._handover

    def _chooses(self, rows: Sequence[Next]) -> bool:
        """Whether a row sees more than an index over tokens picks."""
        most = self._model.spec.densest_context
        return most is not None and any(row.position >= most for row in rows)

    def _reads_ahead(self, num_rows: int, ranks: RankLink | None) -> bool:
        """Whether keys and values in the host's memory come to a buffer while the CPU computes: of one
        sequence, while no pass needs the buffer."""
        staging = self._model.cache.staging
        if staging is None or staging.is_busy or num_rows > 1:
            return False
        return self._handover_with(ranks) is not None

    def _submit(
        self, stream: Stream, num_rows: int, num_layers: int, ranks: RankLink | None, chooses: bool
    ) -> None:
        model, executed, handover = self._model, self._executed, self._handover_with(ranks)
        buffers = self._workspace.view(num_rows)
        tables = self._tables.of(num_rows)
        rows = DecodeRows(
            model=model,
            product_of_experts=self._product,
            own=buffers,
            tables=tables,
            ahead=KvAhead(model, tables) if self._reads_ahead(num_rows, ranks) else None,
            attention_workspace=self._attention,
            gpu_ids=self._gpu_ids[:num_rows],
            cpu_ids=self._cpu_ids[:num_rows],
            executed=executed,
            handover=handover,
            residency=self._residency,
            arrivals=self._arrivals,
            ranks=ranks,
            chooses=chooses,
        )

        def clear(_: int) -> None:
            executed.zero_()

        stream.launch("clear executed", clear, reads=(), writes=(executed,))
        # Read by a kernel: a copy would wait its turn behind the experts that a pass under way has copied.
        inputs = (
            (buffers.hidden, self._host_rows[:num_rows]),
            *self._tables.inputs(num_rows),
            *(() if ranks is None else ranks.inputs),
        )
        model.kernels.fetch(stream, inputs, self._fetched, executed)
        self._looked_up.begin(stream, buffers, self._fetched, executed)
        if handover is not None:
            handover.begin(stream)
        for blocks in self._blocks[:num_layers]:
            for block in blocks:
                block.run(rows)
        self._end.read(buffers, range(num_rows), 0, rows.small_product)
        rows.product(buffers.x, model.weights.lm_head, buffers.logits)
        cap_logits(stream, buffers.logits, model.spec.logits_cap)
        stream.copy(self._host_logits[:num_rows], buffers.logits)
        stream.copy(self._host_executed, executed)
