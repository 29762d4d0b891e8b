"""A token of each of a few sequences on GPU and CPU together: dense layers, attention and resident experts on
the GPU, the other experts on the CPU, in one captured graph that hands over once a layer each way.

While the CPU computes its experts of a layer, the GPU computes its own of the same layer; then it adds both.
If every expert is resident there is no hand-over at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.backend import Logits
from krasis.runtime.device.api import Graph, Stream
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.table import Blocks, blocks_of
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.decode_rows import DecodeRows
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.experts.host_experts import CpuTier, HostExperts
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.head import cap_logits
from krasis.runtime.gpu.kernels.moe import MAX_ROUTER_TOKENS
from krasis.runtime.gpu.model import GpuModel

TIMEOUT_S = 20.0
MAX_ROWS = MAX_ROUTER_TOKENS
"""Tokens of one call."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where a token's time went, by the host's clock, and which side computed how many experts.

    submit_s: replaying the graph. cpu_experts_s: the CPU's experts. wait_gpu_s: the CPU waited for the GPU:
    its part of the critical path up to the last layer. tail_s: from the last hand-over (or, without one, from
    the replay) until the logits are there.
    """

    total_s: float = 0.0
    submit_s: float = 0.0
    cpu_experts_s: float = 0.0
    wait_gpu_s: float = 0.0
    tail_s: float = 0.0
    num_cpu_experts: float = 0.0
    num_gpu_experts: float = 0.0


@dataclass(frozen=True, slots=True)
class Next:
    """The next token of a sequence: at a position of its slot."""

    token: int
    position: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class _Captured:
    """The graph of so many rows; host: the CPU's side of it, None if every expert is resident."""

    graph: Graph
    host: HostExperts | None


class HybridDecoder:
    """Decodes token after token of the sequences whose keys and values lie in ``model.cache``.

    cpu: may be None only if every expert is resident. residency: None if no expert ever is. timeout_s: how
    long one side waits for the other in a layer before the token fails. max_rows: sequences at once.
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
    ) -> None:
        """Raises UsageError without CPU experts unless all are resident, and OutOfDeviceMemoryError."""
        shape, device = model.shape, model.device
        self._model, self._product, self._residency = model, product, residency
        self._blocks = blocks_of(model) if blocks is None else blocks
        self.max_rows = min(max_rows, MAX_ROWS)
        routers = [block for part in self._blocks for block in part if isinstance(block, GpuExperts)]
        self._routed = sum(block.top_k for block in routers)  # slots of a token
        is_complete = residency is not None and residency.is_complete
        if cpu is None and not is_complete:
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
        self._workspace = Workspace(device, model.spec, model.dtype, self.max_rows, 1)
        choices = (self.max_rows, shape.num_experts_per_token)
        self._gpu_ids = device.empty(choices, torch.int32)
        self._cpu_ids = device.empty(choices, torch.int32)
        self._table = device.empty((self.max_rows, ROW_WORDS), torch.int64)
        self._executed = device.empty((1,), torch.int64)
        self._fetched = device.flags(1)  # that nobody waits for
        self._attention = device.empty((self._attention_bytes(),), torch.uint8)
        self._host_rows = device.pinned((self.max_rows, shape.hidden_size), torch.float32)
        self._host_table = device.pinned((self.max_rows, ROW_WORDS), torch.int64)
        self._host_executed = device.pinned((1,), torch.int64)
        logits = self._workspace.view(self.max_rows).logits
        self._host_logits = device.pinned(logits.shape, torch.float32)
        self._captured: dict[int, _Captured] = {}
        self._split = Split()
        self._sums = np.zeros(len(asdict(self._split)))
        self._num_tokens = 0

    def _attention_bytes(self) -> int:
        """Of the layer that needs the most."""
        model = self._model
        parts = (part for part in model.cache.parts if part is not None)
        sizes = {part.head_dim for part in parts if part.value_dim}  # latent attention has a buffer
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
        if self._residency is not None:
            self._residency.prepare(self._model.stream)
        try:
            captured = self._captured.get(len(rows))
            if captured is None:
                captured = self._captured[len(rows)] = self._capture(len(rows))
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
        self._model.device.host_writes(host_rows, self._host_table)
        self._model.weights.embedding.rows_into(np.array([row.token for row in rows]), host_rows.numpy())
        table = self._host_table.numpy()
        for index, row in enumerate(rows):
            address = cache.slot_address(row.slot)
            table[index] = (row.position, address, address)

    def _run(self, captured: _Captured, num_rows: int) -> None:
        model, handover, host = self._model, self._handover, captured.host
        began = time.perf_counter()
        if handover is not None:
            handover.epoch.value += 1
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
        self._check_counts(num_cpu, int(self._host_executed[0]), num_rows)
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
                num_gpu_experts=int(self._host_executed[0]),
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
        handover = self._handover
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

    def _capture(self, num_rows: int) -> _Captured:
        """The graph of a token of so many sequences. The first layers run once before, up to one of each
        kind: CUDA loads a kernel when it is first launched, which it does not like to do while it captures.
        """
        model, handover = self._model, self._handover
        layers = model.spec.layers
        warm = 1 + max(layers.index(layer) for layer in dict.fromkeys(layers))
        if handover is not None:
            handover.reset(model.stream)
            handover.answer(
                sum(isinstance(block, GpuExperts) for blocks in self._blocks[:warm] for block in blocks)
            )
        with self._rows_of_nobody(num_rows):
            self._submit(model.stream, num_rows, warm)
            model.stream.synchronize()
        host = self._host
        if handover is not None:
            handover.reset(model.stream)
            if self._cpu is not None and num_rows > 1:
                host = HostExperts(handover, self._cpu, model.spec, num_rows)
        with model.device.capture(model.stream) as graph:
            self._submit(model.stream, num_rows, len(self._blocks))
        return _Captured(graph, host)

    @contextmanager
    def _rows_of_nobody(self, num_rows: int) -> Iterator[None]:
        """Inside of it no row changes what a sequence keeps: a state would have met its token twice."""
        table = self._host_table[:num_rows]
        kept = table[:, 0].clone()
        self._model.device.host_writes(table)
        table[:, 0] = -1
        yield
        self._model.device.host_writes(table)
        table[:, 0] = kept

    def _submit(self, stream: Stream, num_rows: int, num_layers: int) -> None:
        model, executed = self._model, self._executed
        buffers = self._workspace.view(num_rows)
        rows = DecodeRows(
            model=model,
            product_of_experts=self._product,
            own=buffers,
            table=self._table[:num_rows],
            attention_workspace=self._attention,
            gpu_ids=self._gpu_ids[:num_rows],
            cpu_ids=self._cpu_ids[:num_rows],
            executed=executed,
            handover=self._handover,
            residency=self._residency,
        )

        def clear(_: int) -> None:
            executed.zero_()

        stream.launch("clear executed", clear, reads=(), writes=(executed,))
        # Read by a kernel: a copy would wait its turn behind the experts that a pass under way has copied.
        inputs = (
            (buffers.hidden, self._host_rows[:num_rows]),
            (self._table[:num_rows], self._host_table[:num_rows]),
        )
        model.kernels.fetch(stream, inputs, self._fetched, executed)
        if self._handover is not None:
            self._handover.begin(stream)
        for blocks in self._blocks[:num_layers]:
            for block in blocks:
                block.run(rows)
        eps = model.spec.norm.eps
        model.kernels.rms_norm(stream, buffers.hidden, model.weights.final_norm, eps, buffers.x)
        rows.product(buffers.x, model.weights.lm_head, buffers.logits)
        cap_logits(stream, buffers.logits, model.spec.logits_cap)
        stream.copy(self._host_logits[:num_rows], buffers.logits)
        stream.copy(self._host_executed, executed)
