"""The blocks of a model on the CPU: each adds its output to the residual by native kernels.

A block is made once for its layer: it reserves buffers, then ``run`` makes its calls for a pass, at once or
into a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError, UnsupportedModelError
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Mixer, Mlp, ModelSpec
from krasis.runtime import reference
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.block_input import BlockInput
from krasis.runtime.cpu.buffers import Buffers
from krasis.runtime.cpu.channel_delta import CpuChannelDelta
from krasis.runtime.cpu.compressed import CpuCompressedAttention
from krasis.runtime.cpu.current import CurrentRows
from krasis.runtime.cpu.delta_kernels import DeltaPlace, gate_rows
from krasis.runtime.cpu.gated_delta import CpuGatedDelta
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.latent import CpuLatentAttention
from krasis.runtime.cpu.latent_experts import LatentProducts
from krasis.runtime.cpu.mamba import CpuMamba2
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.rope import RopeTables
from krasis.runtime.cpu.short_conv import CpuShortConv
from krasis.runtime.cpu.spans import LayerCache, Round, Rounds, RowByRow, Spans
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights, expert_biases
from krasis.runtime.state.kv_store import KvStore

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CpuContext:
    """What the blocks of a model share. tiles: of the experts. ropes: tables by the record of a rotation.
    caches: where each layer's keys and values lie in a slot, fixed: where its matrices; fixed_begin:
    where those of the first layer begin. scratch: the kernels' workspace. store: of the sequences. current:
    the tokens that are computed.
    """

    spec: ModelSpec
    tiles: str
    ropes: Mapping[Rope, RopeTables]
    caches: tuple[LayerCache | None, ...]
    buffers: Buffers
    scratch: Array
    store: KvStore
    current: CurrentRows
    fixed: tuple[DeltaPlace | None, ...] = ()
    fixed_begin: int = 0

    def chooses(self, cache: LayerCache) -> bool:
        """Whether in a layer's cache there is room for more tokens than an index picks."""
        return self.spec.densest_context is not None and cache.capacity > self.spec.densest_context


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one pass: how many, whose they are, and the residual [num, hidden]. rounds: the same in
    parts; None where a sequence has one row at most. chooses: some row sees more than an index picks. mixed:
    what blocks between streams read, [num, hidden]; hidden is then zeros, which they add to. trail: for rows
    behind which a sequence's fixed bytes are to be copied, these and their copy.
    """

    num: int
    spans: Spans
    hidden: FloatArray
    rounds: Rounds | RowByRow | None = None
    chooses: bool = False
    mixed: FloatArray | None = None
    trail: Mapping[int, tuple[Array, Array]] | None = None


class Block(Protocol):
    """A mixer or an MLP of one layer."""

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """hidden += block(norm(hidden))."""
        ...


class CpuAttention:
    """hidden += output(attention(norm(hidden)))."""

    def __init__(self, context: CpuContext, index: int, mixer: Attention, weights: LayerWeights) -> None:
        cache = context.caches[index]
        if cache is None:
            raise NativeError("the layer has no cache", where="attention", got=index)
        self._context, self._mixer, self._cache = context, mixer, cache
        self._heads = Heads(mixer.heads, mixer.kv_heads, mixer.head_dim, shared_kv=mixer.shared_kv)
        self._rotation: Rotation | None = None
        if mixer.rope is not None:
            tables = context.ropes[mixer.rope]
            self._rotation = Rotation(tables.cos, tables.sin, mixer.rope.style)
        self._input = BlockInput(weights, "attention.norm", context.spec.norm.eps)
        self._qk_norms = _qk_norms(context.spec, mixer, weights)
        self._qkv, self._output = weights.int8("attention.qkv"), weights.int8("attention.output")
        self._qkv_bias = weights.optional_vector("attention.qkv.bias")
        self._output_bias = weights.optional_vector("attention.output.bias")
        self._sinks = weights.optional_vector("attention.sinks")
        self._post_norm = weights.optional_vector("attention.post_norm")
        if self._post_norm is not None:
            context.buffers.reserve("added", context.spec.hidden)
        context.buffers.reserve("wide", self._heads.qkv_size)
        context.buffers.reserve("attended", self._heads.attention_size)
        context.buffers.reserve_acts(self._heads.attention_size)
        self._gate = weights.int8("attention.gate") if mixer.output_gate == "channel" else None
        if self._gate is not None:
            context.buffers.reserve("output_gate", self._gate.num_rows)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, heads, buffers = self._context, self._heads, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        qkv = buffers.rows("wide", rows.num, heads.qkv_size)
        attended = buffers.rows("attended", rows.num, heads.attention_size)
        attended_acts = buffers.acts(rows.num, heads.attention_size)
        self._input.read(kernels, rows.hidden, rows.mixed, acts)
        kernels.gemm_int8_rows(acts, self._qkv.codes, self._qkv.scales, qkv)
        if self._gate is not None:
            gate = buffers.rows("output_gate", rows.num, heads.attention_size)
            kernels.gemm_int8_rows(acts, self._gate.codes, self._gate.scales, gate)
        for part in self._rounds(rows):
            self._attend(kernels, part, qkv[part.begin : part.end], attended[part.begin : part.end])
        if self._gate is not None:
            gate_rows(kernels, attended, gate)
        kernels.quantize(attended, attended_acts)
        if self._post_norm is not None:
            self._add_normed(kernels, attended_acts, rows, self._post_norm)
            return
        _add_product(kernels, attended_acts, self._output, rows.hidden)
        if self._output_bias is not None:
            kernels.add_rows(rows.hidden, bias=self._output_bias)

    def _rounds(self, rows: Rows) -> tuple[Round, ...]:
        """Parts that a ring has room for: what is stored must leave what its rows see."""
        window = self._mixer.window
        if rows.rounds is None or window is None or not self._cache.is_ring:
            return (Round(0, rows.num, rows.spans),)
        return rows.rounds.of(self._cache.capacity - window + 1)

    def _attend(self, kernels: Kernels, part: Round, qkv: Array, attended: Array) -> None:
        heads, mixer, cache = self._heads, self._mixer, self._cache
        kernels.qk_norm_rope_store(
            qkv,
            heads,
            part.spans,
            cache,
            self._rotation,
            self._qk_norms,
            self._qkv_bias,
            mixer.clip,
            mixer.value_norm,
        )
        scratch, window = self._context.scratch, mixer.window
        kernels.attention(qkv, heads, part.spans, cache, mixer.scale, attended, scratch, window, self._sinks)

    def _add_normed(self, kernels: Kernels, acts: Acts, rows: Rows, weight: FloatArray) -> None:
        """hidden += norm(output(attention))."""
        added = self._context.buffers.rows("added", rows.num, self._context.spec.hidden)
        kernels.gemm_int8_rows(acts, self._output.codes, self._output.scales, added)
        if self._output_bias is not None:
            kernels.add_rows(added, bias=self._output_bias)
        kernels.rms_norm(added, weight, self._context.spec.norm.eps, added)
        kernels.add_rows(rows.hidden, added)


class GatedProducts:
    """out += down(activation(gate x, up x)), of a dense MLP or a shared expert. prefix: of its tensors."""

    def __init__(self, buffers: Buffers, mlp: GatedMlp, weights: LayerWeights, prefix: str) -> None:
        self._buffers, self._mlp = buffers, mlp
        self._columns = (2 if mlp.activation.gated else 1) * mlp.intermediate
        self._w13, self._w2 = weights.int8(f"{prefix}.w13"), weights.int8(f"{prefix}.w2")
        self._w13_bias = weights.optional_vector(f"{prefix}.w13.bias")
        self._w2_bias = weights.optional_vector(f"{prefix}.w2.bias")
        buffers.reserve("wide", self._columns)
        buffers.reserve_acts(mlp.intermediate)

    def run(self, kernels: Kernels, acts: Acts, out: FloatArray, accumulate: bool = True) -> None:
        """out [T, hidden] of acts [T, hidden]."""
        middle = self._buffers.rows("wide", acts.tokens, self._columns)
        middle_acts = self._buffers.acts(acts.tokens, self._mlp.intermediate)
        kernels.gemm_int8_rows(acts, self._w13.codes, self._w13.scales, middle)
        if self._w13_bias is not None:
            kernels.add_rows(middle, bias=self._w13_bias)
        kernels.gated_activation(middle, self._mlp.activation, acts=middle_acts)
        kernels.gemm_int8_rows(middle_acts, self._w2.codes, self._w2.scales, out, accumulate)
        if self._w2_bias is not None:
            kernels.add_rows(out, bias=self._w2_bias)


class CpuMlp:
    """hidden += down(activation(gate x, up x)), x = norm(hidden)."""

    def __init__(self, context: CpuContext, index: int, mlp: GatedMlp, weights: LayerWeights) -> None:
        self._context = context
        self._input = BlockInput(weights, "mlp.norm", context.spec.norm.eps)
        self._products = GatedProducts(context.buffers, mlp, weights, "mlp")

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        spec = self._context.spec
        acts = self._context.buffers.acts(rows.num, spec.hidden)
        self._input.read(kernels, rows.hidden, rows.mixed, acts)
        self._products.run(kernels, acts, rows.hidden)


class CpuExperts:
    """hidden += the routed experts of norm(hidden), and the shared one if there is one."""

    def __init__(self, context: CpuContext, index: int, mlp: Experts, weights: LayerWeights) -> None:
        self._context, self._mlp = context, mlp
        self._input = BlockInput(weights, "experts.norm", context.spec.norm.eps)
        self._router = weights.matrix("experts.router").data
        self._records = weights.records()
        self._table = weights.table("experts.router.table", mlp.count) if mlp.router.by_token else None
        self._router_norm: FloatArray | None = None
        if mlp.router.input_norm:
            scale = weights.vector("experts.router.scale")
            self._router_norm = scale * np.float32(context.spec.hidden**-0.5)
        self._biases = tuple(
            weights.optional_vector(f"experts.router.{name}")
            for name in ("bias", "correction_bias", "expert_scale")
        )
        self._expert_biases = expert_biases(weights)
        buffers = context.buffers
        buffers.reserve("normed", context.spec.hidden)
        buffers.reserve("router", mlp.count)
        buffers.reserve("ids", mlp.router.top_k)
        buffers.reserve("weights", mlp.router.top_k)
        self._shared = (
            GatedProducts(buffers, mlp.shared, weights, "shared") if mlp.shared is not None else None
        )
        self._latent = LatentProducts(buffers, mlp.latent, weights) if mlp.latent is not None else None
        self._gate = weights.matrix("shared.gate").data if mlp.shared_gate else None
        if self._gate is not None:
            buffers.reserve("gate", 1)
            buffers.reserve("shared", context.spec.hidden)

    def run(self, kernels: Kernels, rows: Rows, out: FloatArray | None = None) -> None:
        """See ``Block``. out: what is added to, else the residual. Raises NativeError if a routed expert was
        left out.
        """
        context, mlp, buffers = self._context, self._mlp, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = buffers.rows("normed", rows.num, context.spec.hidden)
        logits = buffers.rows("router", rows.num, mlp.count)
        ids, weights = (buffers.rows(name, rows.num, mlp.router.top_k) for name in ("ids", "weights"))
        normed = self._input.read(kernels, rows.hidden, rows.mixed, acts, normed)
        if self._router_norm is not None:
            kernels.rms_norm(rows.hidden, self._router_norm, context.spec.norm.eps, normed)
        kernels.gemm_float(normed, self._router, logits)
        if self._table is None:
            kernels.route(logits, mlp.router, ids, weights, *self._biases)
        else:
            kernels.step("look experts up", lambda: self._look_up(logits, ids, weights))
        inputs, added = acts, rows.hidden if out is None else out
        if self._latent is not None:
            inputs, added = self._latent.begin(kernels, acts)
        executed = kernels.moe(
            self._records,
            self._records.shape[1],
            context.tiles,
            inputs,
            ids,
            weights,
            added,
            mlp.intermediate,
            mlp.count,
            context.scratch,
            mlp.activation,
            self._expert_biases,
        )
        if executed != ids.size:
            raise NativeError(
                "not every routed expert was run", where="krasis_moe", got=executed, limit=ids.size
            )
        if self._latent is not None:
            self._latent.end(kernels, added, rows.hidden)
            if mlp.latent == context.spec.hidden:  # which the shared expert's input shares its memory with
                kernels.quantize(normed, acts)
        if self._shared is not None:
            self._add_shared(kernels, self._shared, rows, normed, acts)

    def _look_up(self, logits: FloatArray, ids: Array, weights: FloatArray) -> None:
        """Experts that the tokens' ids choose, and their weights by the logits."""
        if self._table is not None:
            ids[...] = self._table[self._context.current.of(len(logits))]
            weights[...] = reference.route_by_token(logits, self._mlp.router, ids)

    def _add_shared(
        self, kernels: Kernels, shared: GatedProducts, rows: Rows, normed: FloatArray, acts: Acts
    ) -> None:
        if self._gate is None:
            shared.run(kernels, acts, rows.hidden)
            return
        gate = self._context.buffers.rows("gate", rows.num, 1)
        out = self._context.buffers.rows("shared", rows.num, self._context.spec.hidden)
        kernels.gemm_float(normed, self._gate, gate)
        shared.run(kernels, acts, out, accumulate=False)
        kernels.add_rows(rows.hidden, out, logits=gate)


class CpuMlpBesideExperts:
    """hidden = (hidden + norm(norm(MLP) + norm(experts))) scale, each of a norm of hidden."""

    def __init__(self, context: CpuContext, index: int, mlp: MlpBesideExperts, weights: LayerWeights) -> None:
        self._context, self._weights = context, weights
        self._products = GatedProducts(context.buffers, mlp.mlp, weights, "mlp")
        self._experts = CpuExperts(context, index, mlp.experts, weights)
        self._scale = float(weights.vector("output_scale")[0])
        self._zeros = np.zeros(context.spec.hidden, np.float32)
        context.buffers.reserve("added", context.spec.hidden)
        context.buffers.reserve("routed", context.spec.hidden)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        buffers, hidden, eps = self._context.buffers, self._context.spec.hidden, self._context.spec.norm.eps
        added, routed = (buffers.rows(name, rows.num, hidden) for name in ("added", "routed"))
        kernels.rms_norm(rows.hidden, self._zeros, eps, routed)  # zeros, to which experts are added
        self._experts.run(kernels, rows, routed)
        kernels.rms_norm(routed, self._weights.vector("experts.post_norm"), eps, routed)
        acts = buffers.acts(rows.num, hidden)
        kernels.rms_norm(rows.hidden, self._weights.vector("mlp.norm"), eps, acts=acts)
        self._products.run(kernels, acts, added, accumulate=False)
        kernels.rms_norm(added, self._weights.vector("mlp.own_post_norm"), eps, added)
        kernels.add_rows(added, routed)
        kernels.rms_norm(added, self._weights.vector("mlp.post_norm"), eps, added)
        kernels.add_rows(rows.hidden, added, scale=self._scale)


BLOCKS: dict[type, Callable[..., Block]] = {
    Attention: CpuAttention,
    LatentAttention: CpuLatentAttention,
    CompressedAttention: CpuCompressedAttention,
    GatedDelta: CpuGatedDelta,
    ChannelDelta: CpuChannelDelta,
    ShortConv: CpuShortConv,
    Mamba2: CpuMamba2,
    GatedMlp: CpuMlp,
    Experts: CpuExperts,
    MlpBesideExperts: CpuMlpBesideExperts,
}


def cpu_block(context: CpuContext, index: int, part: Mixer | Mlp, weights: LayerWeights) -> Block:
    """The block that computes a mixer or an MLP. Raises UnsupportedModelError if there is none."""
    make = BLOCKS.get(type(part))
    if make is None:
        raise UnsupportedModelError("the CPU has no block for this part of a model", got=type(part).__name__)
    return make(context, index, part, weights)


def _add_product(kernels: Kernels, acts: Acts, weight: Int8Weight, out: FloatArray) -> None:
    kernels.gemm_int8_rows(acts, weight.codes, weight.scales, out, accumulate=True)


def _qk_norms(spec: ModelSpec, mixer: Attention, weights: LayerWeights) -> QkNorms | None:
    if mixer.qk_norm == "none":
        return None
    if mixer.qk_norm == "unweighted_after_rope":
        raise UnsupportedModelError("the CPU has no such norms of q and k", got=mixer.qk_norm)
    q, k = weights.vector("attention.q_norm"), weights.vector("attention.k_norm")
    return QkNorms(q, k, spec.norm.eps, mixer.qk_norm)
