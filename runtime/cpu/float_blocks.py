"""The blocks of a model in float32 NumPy on dequantised weights: what the kernels are measured against."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError, UnsupportedModelError
from krasis.formats.layouts import ExpertFormat, Int8RowsLayout
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Mixer, Mlp, ModelSpec
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu import delta_reference as delta
from krasis.runtime.cpu.current import CurrentRows
from krasis.runtime.cpu.float_compressed import FloatCompressedAttention
from krasis.runtime.cpu.float_conv import FloatShortConv
from krasis.runtime.cpu.float_delta import FloatChannelDelta
from krasis.runtime.cpu.float_latent import FloatLatentAttention
from krasis.runtime.cpu.float_mamba import FloatMamba2
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.rope import RopeTables
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights, expert_biases, to_float32
from krasis.runtime.state.hybrid_store import HybridStore
from krasis.runtime.state.kv_store import KvStore

FloatArray = npt.NDArray[np.float32]


class UnpackedCache:
    """Unpacked weights by key, the least recently used given up beyond limit_bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._held: OrderedDict[Hashable, tuple[Array, ...]] = OrderedDict()

    def get(self, key: Hashable, unpack: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
        """What unpack gave for the key, now or before."""
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = unpack()
            self._num_bytes += _num_bytes(found)
            while self._num_bytes > self._limit_bytes and len(self._held) > 1:
                self._num_bytes -= _num_bytes(self._held.popitem(last=False)[1])
        else:
            self._held.move_to_end(key)
        return found

    def clear(self) -> None:
        """Gives everything up."""
        self._held.clear()
        self._num_bytes = 0


@dataclass(frozen=True, slots=True)
class FloatContext:
    """What the blocks of a model share. ropes: tables by the record of a rotation. chosen: by slot, the
    positions that an index last picked, bool [rows, positions]. current: the tokens that are computed.
    """

    spec: ModelSpec
    layout: ExpertFormat
    store: KvStore
    ropes: Mapping[Rope, RopeTables]
    unpacked: UnpackedCache
    chosen: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    current: CurrentRows = field(default_factory=CurrentRows)

    def dense(self, index: int, weights: LayerWeights, name: str) -> FloatArray:
        """[n, k] of an INT8 weight, without padding rows being cut off."""
        return self.int8((index, name), weights.int8(name))

    def int8(self, key: Hashable, weight: Int8Weight) -> FloatArray:
        """[n, k] of an INT8 weight, kept under a key."""
        return self.unpacked.get(key, lambda: (Int8RowsLayout().unpack(weight.codes, weight.scales),))[0]

    def block_input(self, hidden: FloatArray, weights: LayerWeights, name: str) -> FloatArray:
        """What a block reads: the norm of the residual, or, where streams were mixed for it, that itself."""
        weight = weights.optional_vector(name)
        return hidden if weight is None else self.norm(hidden, weight)

    def norm(self, x: FloatArray, weight: FloatArray) -> FloatArray:
        """The model's norm of rows."""
        return reference.rms_norm(x, weight, self.spec.norm.eps)


class FloatAttention:
    """output(attention(norm(hidden)))."""

    def __init__(self, context: FloatContext, index: int, mixer: Attention, weights: LayerWeights) -> None:
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        context, mixer, weights = self._context, self._mixer, self._weights
        normed = context.block_input(hidden, weights, "attention.norm")
        rows = mixer.query_rows + (1 if mixer.shared_kv else 2) * mixer.key_rows
        qkv = reference.gemm(normed, context.dense(self._index, weights, "attention.qkv"))[:, :rows]
        attended = np.concatenate([self._attend(qkv[s.first_row : s.end_row], s) for s in spans])
        if mixer.output_gate == "channel":
            gate = context.dense(self._index, weights, "attention.gate")[: mixer.query_rows]
            attended = attended * reference.sigmoid(reference.gemm(normed, gate))
        output = context.dense(self._index, weights, "attention.output")[: context.spec.hidden]
        added = reference.gemm(attended, output)
        bias = weights.optional_vector("attention.output.bias")
        added = added if bias is None else added + bias
        post_norm = weights.optional_vector("attention.post_norm")
        return added if post_norm is None else context.norm(added, post_norm)

    def _attend(self, qkv: FloatArray, span: Span) -> FloatArray:
        """Attention of one sequence's rows, [rows, heads * head_dim]; their keys and values are kept."""
        context, mixer, weights = self._context, self._mixer, self._weights
        vectors = reference.QkvVectors(
            weights.optional_vector("attention.qkv.bias"),
            weights.optional_vector("attention.q_norm"),
            weights.optional_vector("attention.k_norm"),
        )
        q, k, v = reference.projected_heads(qkv, mixer, vectors, context.spec.norm.eps)
        if mixer.rope is not None:
            tables = context.ropes[mixer.rope]
            tables.ensure(span.end)
            cos, sin = tables.cos[span.start : span.end], tables.sin[span.start : span.end]
            q, k = (reference.rotate(x, cos, sin, mixer.rope) for x in (q, k))
        if mixer.qk_norm == "head_after_rope":
            q, k = reference.normed_heads(q, k, vectors, context.spec.norm.eps)
        keys, values, first = context.store.extend(
            span.slot, self._index, span.start, k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        )
        attended = reference.attention(
            q,
            keys,
            values,
            span.start - first,
            mixer.scale,
            window=mixer.window,
            sinks=weights.optional_vector("attention.sinks"),
        )
        return attended.reshape(span.rows, mixer.query_rows)


class FloatMlp:
    """down(activation(gate x, up x)) of norm(hidden)."""

    def __init__(self, context: FloatContext, index: int, mlp: GatedMlp, weights: LayerWeights) -> None:
        self._context, self._index, self._mlp, self._weights = context, index, mlp, weights

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        normed = self._context.block_input(hidden, self._weights, "mlp.norm")
        return gated_mlp(self._context, self._index, self._mlp, self._weights, "mlp", normed)


class FloatExperts:
    """The routed experts of norm(hidden), and the shared one if there is one."""

    def __init__(self, context: FloatContext, index: int, mlp: Experts, weights: LayerWeights) -> None:
        self._context, self._index, self._mlp, self._weights = context, index, mlp, weights
        self._table = weights.table("experts.router.table", mlp.count) if mlp.router.by_token else None

    def run(
        self, hidden: FloatArray, spans: tuple[Span, ...], observe: reference.ExpertObserver | None = None
    ) -> FloatArray:
        """What the block adds to hidden [T, hidden]. observe: see ``reference.moe``."""
        context, mlp, weights = self._context, self._mlp, self._weights
        normed = context.block_input(hidden, weights, "experts.norm")
        router = weights.matrix("experts.router")
        scored = normed
        if mlp.router.input_norm:
            scale = weights.vector("experts.router.scale") * np.float32(context.spec.hidden**-0.5)
            scored = context.norm(hidden, scale)
        logits = reference.gemm(scored, to_float32(router.data, router.dtype))
        ids, shares = self._routed(logits)
        biases = expert_biases(weights)
        inputs = normed if mlp.latent is None else self._projected(normed, "experts.latent_input", mlp.latent)
        added = reference.moe(inputs, ids, shares, self._expert, observe, mlp.activation, biases)
        if mlp.latent is not None:
            added = self._projected(added, "experts.latent_output", context.spec.hidden)
        if mlp.shared is None:
            return added
        shared = gated_mlp(context, self._index, mlp.shared, weights, "shared", normed)
        if mlp.shared_gate:
            gate = weights.matrix("shared.gate")
            shared = shared * reference.sigmoid(reference.gemm(normed, to_float32(gate.data, gate.dtype)))
        return added + shared

    def _routed(self, logits: FloatArray) -> tuple[Array, Array]:
        """Experts and their weights, [T, top_k] each."""
        router, weights = self._mlp.router, self._weights
        if self._table is not None:
            ids = self._table[self._context.current.of(len(logits))]
            return ids, reference.route_by_token(logits, router, ids)
        vectors = reference.RouterVectors(
            weights.optional_vector("experts.router.bias"),
            weights.optional_vector("experts.router.correction_bias"),
            weights.optional_vector("experts.router.expert_scale"),
        )
        return reference.route(logits, router, vectors)

    def _projected(self, x: FloatArray, name: str, rows: int) -> FloatArray:
        return reference.gemm(x, self._context.dense(self._index, self._weights, name)[:rows])

    def _expert(self, number: int) -> tuple[Array, Array, Array]:
        context, records = self._context, self._weights.records()
        sizes = (self._mlp.width(context.spec.hidden), self._mlp.intermediate, self._mlp.gated)
        unpack = functools.partial(context.layout.unpack_expert, records[number], *sizes)
        gate, up, down = context.unpacked.get((self._index, number), unpack)
        return gate, up, down


class FloatMlpBesideExperts:
    """An MLP and experts on the same residual, each with norms before and after, their sum normed again."""

    def __init__(
        self, context: FloatContext, index: int, mlp: MlpBesideExperts, weights: LayerWeights
    ) -> None:
        self._context, self._index, self._mlp, self._weights = context, index, mlp.mlp, weights
        self._experts = FloatExperts(context, index, mlp.experts, weights)

    def run(
        self, hidden: FloatArray, spans: tuple[Span, ...], observe: reference.ExpertObserver | None = None
    ) -> FloatArray:
        """What the block adds to hidden [T, hidden], and what the factor on the sum takes or gives."""
        context, weights = self._context, self._weights
        normed = context.norm(hidden, weights.vector("mlp.norm"))
        dense = gated_mlp(context, self._index, self._mlp, weights, "mlp", normed)
        dense = context.norm(dense, weights.vector("mlp.own_post_norm"))
        routed = context.norm(self._experts.run(hidden, spans, observe), weights.vector("experts.post_norm"))
        added = context.norm(dense + routed, weights.vector("mlp.post_norm"))
        scaled: FloatArray = (hidden + added) * weights.vector("output_scale")[0] - hidden
        return scaled


def gated_mlp(
    context: FloatContext, index: int, mlp: GatedMlp, weights: LayerWeights, prefix: str, x: FloatArray
) -> FloatArray:
    """down(activation(gate x, up x)) of x [T, hidden]; prefix: of the tensors' names."""
    rows = (2 if mlp.activation.gated else 1) * mlp.intermediate
    middle = reference.gemm(x, context.dense(index, weights, f"{prefix}.w13")[:rows])
    bias = weights.optional_vector(f"{prefix}.w13.bias")
    middle = reference.activate(middle if bias is None else middle + bias, mlp.activation)
    out = reference.gemm(middle, context.dense(index, weights, f"{prefix}.w2")[: context.spec.hidden])
    bias = weights.optional_vector(f"{prefix}.w2.bias")
    return out if bias is None else out + bias


class FloatGatedDelta:
    """output(gated delta rule(norm(hidden)))."""

    def __init__(self, context: FloatContext, index: int, mixer: GatedDelta, weights: LayerWeights) -> None:
        if not isinstance(context.store, HybridStore):
            raise NativeError("the state has no place for this layer", where="gated delta", got=index)
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        self._store = context.store

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        context, mixer, weights = self._context, self._mixer, self._weights
        normed = context.block_input(hidden, weights, "attention.norm")
        rows = mixer.conv_channels + mixer.value_heads * mixer.value_dim
        projected = reference.gemm(normed, context.dense(self._index, weights, "delta.qkvz")[:rows])
        ba = weights.matrix("delta.ba")
        gates = reference.gemm(normed, to_float32(ba.data, ba.dtype))
        vectors = delta.DeltaVectors(
            conv=weights.vector("delta.conv"),
            a_log=weights.vector("delta.a_log"),
            dt_bias=weights.vector("delta.dt_bias"),
            gate_norm=weights.vector("delta.gate_norm"),
            eps=context.spec.norm.eps,
        )
        mixed = [
            delta.gated_delta(
                projected[s.first_row : s.end_row],
                gates[s.first_row : s.end_row],
                mixer,
                vectors,
                *self._store.fixed(s.slot, self._index),
                is_first=s.start == 0,
            )
            for s in spans
        ]
        output = context.dense(self._index, weights, "delta.output")[: context.spec.hidden]
        return reference.gemm(np.concatenate(mixed), output)


FloatBlock = (
    FloatAttention
    | FloatLatentAttention
    | FloatCompressedAttention
    | FloatGatedDelta
    | FloatChannelDelta
    | FloatShortConv
    | FloatMamba2
    | FloatMlp
    | FloatExperts
    | FloatMlpBesideExperts
)
BLOCKS: dict[type, Callable[..., FloatBlock]] = {
    Attention: FloatAttention,
    LatentAttention: FloatLatentAttention,
    CompressedAttention: FloatCompressedAttention,
    GatedDelta: FloatGatedDelta,
    ChannelDelta: FloatChannelDelta,
    ShortConv: FloatShortConv,
    Mamba2: FloatMamba2,
    GatedMlp: FloatMlp,
    Experts: FloatExperts,
    MlpBesideExperts: FloatMlpBesideExperts,
}


def float_block(context: FloatContext, index: int, part: Mixer | Mlp, weights: LayerWeights) -> FloatBlock:
    """The block that computes a mixer or an MLP. Raises UnsupportedModelError if there is none."""
    make = BLOCKS.get(type(part))
    if make is None:
        raise UnsupportedModelError("no block for this part of a model", got=type(part).__name__)
    return make(context, index, part, weights)


def _num_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in arrays)
