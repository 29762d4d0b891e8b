"""One token on GPU and CPU together: dense layers, attention and resident experts on the GPU, the other
experts on the CPU, in one captured graph that hands over once a layer each way.

While the CPU computes its experts of a layer, the GPU computes its own of the same layer; then it adds both.
If every expert is resident there is no hand-over at all.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.backend import Logits
from krasis.runtime.device.api import Graph, Stream
from krasis.runtime.gpu.buffers import Buffers, Workspace
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.experts.host_experts import CpuTier, HostExperts
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, QkvForm
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.prefill import GpuModel, softmax_router
from krasis.runtime.gpu.weights import GpuInt8, GpuLayer

TIMEOUT_S = 20.0


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


class HybridDecoder:
    """Decodes token after token of one sequence, whose keys and values lie in ``model.cache``.

    cpu: may be None only if every expert is resident. residency: None if no expert ever is. timeout_s: how
    long one side waits for the other in a layer before the token fails.
    """

    def __init__(
        self,
        model: GpuModel,
        product: ExpertProduct,
        cpu: CpuTier | None,
        residency: Residency | None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Raises UsageError without CPU experts unless all are resident, and OutOfDeviceMemoryError."""
        a, device = model.architecture, model.device
        self._model, self._product, self._residency = model, product, residency
        is_complete = residency is not None and residency.is_complete
        if cpu is None and not is_complete:
            raise UsageError(
                "decode needs CPU experts, or all experts in VRAM",
                hint="convert with both tiers (krasis-convert --tiers gpu,cpu), or decode through prefill",
            )
        self._handover: Handover | None = None
        self._host: HostExperts | None = None
        if cpu is not None and not is_complete:
            self._handover = Handover(device, model.kernels, a, timeout_s)
            self._host = HostExperts(self._handover, cpu, a)
        buffers = Workspace(device, a, model.dtype, 1, 1).view(1)
        self._buffers = buffers
        self._gpu_ids = device.empty(buffers.ids.shape, torch.int32)
        self._cpu_ids = device.empty(buffers.ids.shape, torch.int32)
        self._position = device.empty((1,), torch.int64)
        self._executed = device.empty((1,), torch.int64)
        self._attention = model.kernels.attention_workspace(model.heads, model.cache.capacity)
        self._host_row = device.pinned((1, a.hidden_size), torch.float32)
        self._host_position = device.pinned((1,), torch.int64)
        self._host_executed = device.pinned((1,), torch.int64)
        self._host_logits = device.pinned(buffers.logits.shape, torch.float32)
        self._graph: Graph | None = None
        self._split = Split()
        self._sums = np.zeros(len(asdict(self._split)))
        self._num_tokens = 0

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
        """Logits [vocab] of the token at a position, a view that the next call overwrites.

        Raises NativeError if a routed expert was left out, or if one side waited in vain (naming the layer);
        the next call begins afresh.
        """
        if not 0 <= position < self._model.cache.capacity:
            raise NativeError(
                "no such position", where="decode", got=position, limit=self._model.cache.capacity
            )
        self._set_inputs(token, position)
        if self._residency is not None:
            self._residency.prepare(self._model.stream)
        try:
            if self._graph is None:
                self._graph = self._capture()
            self._run(self._graph)
        except BaseException:  # also Ctrl-C: the GPU may wait for answers that nobody will give
            self._recover()
            raise
        if self._residency is not None:
            self._residency.after_token(self._model.stream)
        logits: Logits = self._host_logits.numpy()[0, : self._model.architecture.vocab_size]
        return logits

    def close(self) -> None:
        """Waits for the GPU. Calling it again does nothing."""
        self._graph = None
        self._model.stream.synchronize()

    # ---- one token -----------------------------------------------------------------------------------------

    def _set_inputs(self, token: int, position: int) -> None:
        self._model.device.host_writes(self._host_row, self._host_position)
        self._model.weights.embedding.rows_into(np.array([token]), self._host_row.numpy())
        self._host_position[0] = position

    def _run(self, graph: Graph) -> None:
        model, handover, host = self._model, self._handover, self._host
        began = time.perf_counter()
        if handover is not None:
            handover.epoch.value += 1
        self._name_residents()
        graph.replay(model.stream)
        self._name_residents()
        ended = model.stream.record()
        submitted = time.perf_counter()
        if host is not None:
            model.device.serve(partial(host.run, ended))
        served = time.perf_counter()
        ended.synchronize()
        model.device.host_reads(self._host_logits, self._host_executed)
        if handover is not None:
            handover.check()
        num_cpu = 0 if host is None else host.num_executed
        self._check_counts(num_cpu, int(self._host_executed[0]))
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

    def _check_counts(self, num_cpu: int, num_gpu: int) -> None:
        a = self._model.architecture
        expected = a.num_layers * a.num_experts_per_token
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

    def _capture(self) -> Graph:
        """The graph of a token. One layer runs once before: CUDA loads a kernel when it is first launched,
        which it does not like to do while it captures."""
        model, handover = self._model, self._handover
        if handover is not None:
            handover.reset(model.stream)
            handover.answer(1)
        self._submit(model.stream, 1)
        model.stream.synchronize()
        if handover is not None:
            handover.reset(model.stream)
        with model.device.capture(model.stream) as graph:
            self._submit(model.stream, model.architecture.num_layers)
        return graph

    def _submit(self, stream: Stream, num_layers: int) -> None:
        model, buffers, executed = self._model, self._buffers, self._executed

        def clear(_: int) -> None:
            executed.zero_()

        stream.copy(buffers.hidden, self._host_row)
        stream.copy(self._position, self._host_position)
        stream.launch("clear executed", clear, reads=(), writes=(executed,))
        if self._handover is not None:
            self._handover.begin(stream)
        for index in range(num_layers):
            layer = model.weights.layers[index]
            self._attend(stream, index, layer)
            self._run_experts(stream, index, layer)
        eps = model.architecture.rms_norm_eps
        model.kernels.rms_norm(stream, buffers.hidden, model.weights.final_norm, eps, buffers.x)
        self._project(stream, buffers.x, model.weights.lm_head, buffers.logits)
        stream.copy(self._host_logits, buffers.logits)
        stream.copy(self._host_executed, executed)

    def _attend(self, stream: Stream, index: int, layer: GpuLayer) -> None:
        """hidden += output(attention(norm(hidden)))."""
        m, b, kernels = self._model, self._buffers, self._model.kernels
        eps, heads = m.architecture.rms_norm_eps, m.heads
        keys, values = m.cache.keys[index], m.cache.values[index]
        kernels.rms_norm(stream, b.hidden, layer.attention_norm, eps, b.x)
        self._project(stream, b.x, layer.qkv, b.qkv)
        form = QkvForm(eps, m.weights.cos, m.weights.sin, layer.q_norm, layer.k_norm)
        place = CachePlace(keys, values, position=self._position)
        kernels.qk_norm_rope_store(stream, b.qkv, heads, form, place)
        queries = b.qkv[:, : heads.attention_size]
        kernels.attention_decode(
            stream, queries, heads, place, heads.head_dim**-0.5, b.attended, self._attention
        )
        self._project(stream, b.attended, layer.output, b.hidden, residual=b.hidden)

    def _project(
        self,
        stream: Stream,
        x: torch.Tensor,
        weight: GpuInt8,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        self._model.kernels.int8_gemm(stream, x, weight.codes, weight.scales, out, residual=residual)

    def _run_experts(self, stream: Stream, index: int, layer: GpuLayer) -> None:
        """hidden += the routed experts of norm(hidden), wherever they are."""
        b, kernels, residency = self._buffers, self._model.kernels, self._residency
        a = self._model.architecture
        kernels.rms_norm(stream, b.hidden, layer.experts_norm, a.rms_norm_eps, b.normed)
        kernels.router(stream, b.normed, layer.router, b.router_logits)
        self._route(stream, index, b)
        if self._handover is not None:
            ids = b.ids if residency is None else self._cpu_ids
            self._handover.send(stream, index, b.normed, ids, b.weights)
        if residency is not None:
            # hidden still is what the norm above saw: the same row, rounded.
            kernels.rms_norm(stream, b.hidden, layer.experts_norm, a.rms_norm_eps, b.x)
            self._run_residents(stream, index, residency)
        if self._handover is not None:
            self._handover.receive(stream, index, b.hidden)

    def _route(self, stream: Stream, index: int, b: Buffers) -> None:
        kernels, residency = self._model.kernels, self._residency
        router = softmax_router(self._model.architecture)
        if residency is None:
            kernels.route(stream, b.router_logits, router, b.ids, b.weights)
            return
        kernels.route(
            stream, b.router_logits, router, b.ids, b.weights, resident=residency.mask[index],
            gpu_ids=self._gpu_ids, cpu_ids=self._cpu_ids, counts=residency.counts[index],
        )  # fmt: skip

    def _run_residents(self, stream: Stream, index: int, residency: Residency) -> None:
        b, product = self._buffers, self._product
        step = Step(
            normed=b.normed,
            x=b.x,
            ids=self._gpu_ids,
            weights=b.weights,
            hidden=b.hidden,
            partial=None,
            buffers=b,
            num_tokens=1,
        )
        product.align(stream, step, b.routing.view(1))
        table, num_experts = residency.table[index], self._model.architecture.num_experts
        product.run(stream, step, table, (), 0, num_experts, self._executed)
        product.reduce(stream, step)
