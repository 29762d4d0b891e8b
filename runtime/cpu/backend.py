"""A Qwen3-MoE decoder on the CPU: INT8 dense weights, tiled experts, int8 activations, native kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import NativeError
from krasis.formats.layouts import CpuTileLayout
from krasis.formats.models.mlps import Router
from krasis.formats.native import Pool
from krasis.runtime.backend import KvRows, LayerProgress, Logits, TokenIds
from krasis.runtime.batch import Span
from krasis.runtime.cpu.heads import QkNorms, Rotation
from krasis.runtime.cpu.kernels import (
    Acts,
    Heads,
    Kernels,
    NativeFunction,
    attention_workspace_bytes,
    moe_workspace_bytes,
    workspace,
)
from krasis.runtime.cpu.native_arrays import Array, aligned_empty
from krasis.runtime.cpu.program import Program
from krasis.runtime.cpu.rope import RopeTables
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans
from krasis.runtime.cpu.weights import LayerWeights, ModelWeights
from krasis.runtime.settings import EngineSettings
from krasis.runtime.state.kv_cache import KvCache

FloatArray = npt.NDArray[np.float32]
LOGIT_ROWS = 64  # tokens whose logits are computed at once when all are wanted


@dataclass(frozen=True, slots=True)
class CpuBuffers:
    """Everything a pass over T tokens writes. Made once; ``first(T)`` gives views of the first rows."""

    hidden: FloatArray  # [T, hidden_size], the residual stream
    normed: FloatArray  # [T, hidden_size], for the router
    hidden_acts: Acts  # [T, hidden_size]
    qkv: FloatArray  # [T, qkv_rows]
    attended: FloatArray  # [T, attention_size]
    attended_acts: Acts  # [T, attention_size]
    router_logits: FloatArray  # [T, num_experts]
    expert_ids: npt.NDArray[np.int32]  # [T, top_k]
    expert_weights: FloatArray  # [T, top_k]

    @classmethod
    def allocate(cls, architecture: Architecture, num_tokens: int) -> CpuBuffers:
        """Uninitialised buffers for num_tokens tokens."""
        a = architecture

        def floats(columns: int) -> Array:
            return aligned_empty((num_tokens, columns), np.float32)

        return cls(
            hidden=floats(a.hidden_size),
            normed=floats(a.hidden_size),
            hidden_acts=Acts.allocate(num_tokens, a.hidden_size),
            qkv=floats(a.qkv_rows),
            attended=floats(a.attention_size),
            attended_acts=Acts.allocate(num_tokens, a.attention_size),
            router_logits=floats(a.num_experts),
            expert_ids=aligned_empty((num_tokens, a.num_experts_per_token), np.int32),
            expert_weights=floats(a.num_experts_per_token),
        )

    def first(self, num_tokens: int) -> CpuBuffers:
        """The same memory for fewer tokens."""
        return CpuBuffers(
            hidden=self.hidden[:num_tokens],
            normed=self.normed[:num_tokens],
            hidden_acts=self.hidden_acts.view(num_tokens),
            qkv=self.qkv[:num_tokens],
            attended=self.attended[:num_tokens],
            attended_acts=self.attended_acts.view(num_tokens),
            router_logits=self.router_logits[:num_tokens],
            expert_ids=self.expert_ids[:num_tokens],
            expert_weights=self.expert_weights[:num_tokens],
        )


class CpuBackend:
    """See ``backend.Backend``. Opening maps weights and reserves buffers; nothing of the weights is read."""

    def __init__(self, weights: ModelWeights, settings: EngineSettings) -> None:
        architecture = weights.architecture
        self.layer_done: LayerProgress | None = None
        self.capacity = settings.context_for(architecture.max_context)
        self.prefill_chunk = settings.cpu_chunk_for(self.capacity)
        self._architecture = architecture
        self._weights: ModelWeights | None = weights
        layout = weights.expert_layout
        if not isinstance(layout, CpuTileLayout):
            raise NativeError("the CPU kernels run CPU tiles only", got=layout.layout_id)
        self._tiles = layout.tiles
        self._heads = Heads(architecture.num_heads, architecture.num_kv_heads, architecture.head_dim)
        self.kv_dtype, self.placement = settings.kv_dtype, ("CPU", "CPU")
        # Refuses a context that RAM cannot hold.
        self._cache = cache = KvCache(architecture, self.capacity, settings.kv_dtype)
        self._rope = RopeTables(architecture, self.capacity)
        self._rotation = Rotation(self._rope.cos, self._rope.sin)
        self._slots = (SlotMemory(cache.keys, cache.values),)
        self._spans = Spans(1, cache.keys.nbytes, cache.values.nbytes)
        self._router = Router(
            top_k=architecture.num_experts_per_token, renormalise=architecture.norm_topk_prob
        )
        self._buffers = CpuBuffers.allocate(architecture, self.prefill_chunk)
        self._one = self._buffers.first(1)
        self._scratch = workspace(
            _workspace_bytes(architecture, self._heads, self.prefill_chunk, self.capacity)
        )
        self._logits = aligned_empty((LOGIT_ROWS, weights.lm_head.num_rows), np.float32)
        self._one_logits = self._logits[:1]
        self._pool = Pool(settings.threads, settings.isa)
        self._kernels = Kernels(self._pool)
        self._one_token = Program()
        self._run_layers(Kernels(self._pool, self._one_token), weights, self._one)
        self.description = (
            f"CPU, {self._pool.isa} kernels ({settings.isa} asked for), {self._pool.num_threads} threads, "
            f"{layout.layout_id} experts, int8 activations, "
            f"{settings.kv_dtype} KV cache of {self.capacity} tokens"
        )

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """See ``backend.Backend``."""
        self._rope.ensure(start + len(tokens))
        buffers = self._buffers.first(len(tokens))
        weights = self._live_weights()
        weights.embedding.rows_into(tokens, buffers.hidden)
        self._spans.set([Span(0, 0, len(tokens), start)], self._slots)
        self._run_layers(self._kernels, weights, buffers)
        if want_all:
            return self._all_logits(buffers.hidden)
        return self._last_logits(buffers.hidden[-1:])

    def decode(self, token: int, position: int) -> Logits:
        """See ``backend.Backend``."""
        self._rope.ensure(position + 1)
        one = self._one
        self._live_weights().embedding.rows_into(np.array([token]), one.hidden)
        self._spans.set([Span(0, 0, 1, position)], self._slots)
        self._one_token.run()
        logits: Logits = self._last_logits(one.hidden)[0]
        return logits

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """See ``backend.Backend``."""
        return self._cache.read(layer, num_tokens)

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """See ``backend.Backend``."""
        self._cache.write(layer, keys, values)

    def watch(self, wrap: Callable[[str, NativeFunction], NativeFunction]) -> None:
        """Every native call of prefill and decode goes through wrap(name, function): for profiles."""
        self._kernels.watch(wrap)
        self._one_token.watch(wrap)

    def close(self) -> None:
        """See ``backend.Backend``."""
        self._weights = None
        self._pool.close()

    def _run_layers(self, run: Kernels, weights: ModelWeights, buffers: CpuBuffers) -> None:
        """From the embedding to the last layer's output, both in buffers.hidden."""
        for index, layer in enumerate(weights.layers):
            self._attend(run, layer, self._layer_cache(index), buffers)
            self._run_experts(run, layer, buffers)
            if self.layer_done is not None:
                self.layer_done(index + 1, len(weights.layers))

    def _layer_cache(self, layer: int) -> LayerCache:
        begin_bytes = layer * self._cache.keys[0].nbytes
        return LayerCache(begin_bytes, begin_bytes, self.capacity, self._cache.dtype)

    def _attend(self, run: Kernels, layer: LayerWeights, cache: LayerCache, buffers: CpuBuffers) -> None:
        """hidden += output(attention(norm(hidden)))."""
        eps, heads, spans = self._architecture.rms_norm_eps, self._heads, self._spans
        run.rms_norm(buffers.hidden, layer.attention_norm, eps, acts=buffers.hidden_acts)
        run.gemm_int8_rows(buffers.hidden_acts, layer.qkv.codes, layer.qkv.scales, buffers.qkv)
        norms = QkNorms(layer.q_norm, layer.k_norm, eps)
        run.qk_norm_rope_store(buffers.qkv, heads, spans, cache, self._rotation, norms)
        scale = heads.head_dim**-0.5
        run.attention(buffers.qkv, heads, spans, cache, scale, buffers.attended, self._scratch)
        run.quantize(buffers.attended, buffers.attended_acts)
        output = layer.output
        run.gemm_int8_rows(
            buffers.attended_acts, output.codes, output.scales, buffers.hidden, accumulate=True
        )

    def _run_experts(self, run: Kernels, layer: LayerWeights, buffers: CpuBuffers) -> None:
        """hidden += the routed experts of norm(hidden). Raises NativeError if one was left out."""
        a = self._architecture
        ids, weights = buffers.expert_ids, buffers.expert_weights
        run.rms_norm(buffers.hidden, layer.experts_norm, a.rms_norm_eps, buffers.normed, buffers.hidden_acts)
        run.gemm_float(buffers.normed, layer.router.data, buffers.router_logits)
        run.route(buffers.router_logits, self._router, ids, weights)
        executed = run.moe(
            layer.experts,
            layer.experts.shape[1],
            self._tiles,
            buffers.hidden_acts,
            ids,
            weights,
            buffers.hidden,
            a.expert_intermediate_size,
            a.num_experts,
            self._scratch,
        )
        if executed != ids.size:
            raise NativeError(
                "not every routed expert was run", where="krasis_moe", got=executed, limit=ids.size
            )

    def _last_logits(self, hidden: FloatArray) -> Logits:
        """[1, vocab] of one token, in a buffer that the next call overwrites."""
        self._head(hidden, self._one.hidden_acts, self._one_logits)
        return self._one_logits[:, : self._architecture.vocab_size]

    def _all_logits(self, hidden: FloatArray) -> Logits:
        """[T, vocab], a new array."""
        vocab = self._architecture.vocab_size
        result = np.empty((len(hidden), vocab), dtype=np.float32)
        for begin in range(0, len(hidden), LOGIT_ROWS):
            rows = hidden[begin : begin + LOGIT_ROWS]
            out = self._logits[: len(rows)]
            self._head(rows, self._buffers.hidden_acts.view(len(rows)), out)
            result[begin : begin + len(rows)] = out[:, :vocab]
        return result

    def _head(self, hidden: FloatArray, acts: Acts, out: Logits) -> None:
        weights = self._live_weights()
        self._kernels.rms_norm(hidden, weights.final_norm, self._architecture.rms_norm_eps, acts=acts)
        self._kernels.gemm_int8_rows(acts, weights.lm_head.codes, weights.lm_head.scales, out)

    def _live_weights(self) -> ModelWeights:
        if self._weights is None:
            raise NativeError("the engine is closed")
        return self._weights


def _workspace_bytes(architecture: Architecture, heads: Heads, num_tokens: int, capacity: int) -> int:
    """What attention and experts need at most; they take turns."""
    a = architecture
    return max(
        attention_workspace_bytes(num_tokens, capacity, heads),
        moe_workspace_bytes(
            num_tokens, a.hidden_size, a.expert_intermediate_size, a.num_experts, a.num_experts_per_token
        ),
    )
