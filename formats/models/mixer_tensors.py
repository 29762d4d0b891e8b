"""The tensors of mixers: attention of all kinds, and blocks with a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Mixer, ModelSpec
from krasis.formats.models.tensor import Tensor, norm


def mixer_tensors(mixer: Mixer, spec: ModelSpec, normed: bool) -> Iterator[Tensor]:
    """The tensors of a mixer with the norm before it, in the order of a bundle."""
    yield from _TENSORS[type(mixer)](mixer, spec.hidden)
    if normed:
        yield norm("attention.norm", spec)


def _attention(mixer: Attention, hidden: int) -> Iterator[Tensor]:
    q, k, v = mixer.query_rows, mixer.key_rows, mixer.kv_heads * mixer.value_width
    parts = {"attention.q": q, "attention.k": k} | ({} if mixer.shared_kv else {"attention.v": v})
    rows = sum(parts.values())
    part_rows = tuple(parts.values())
    yield Tensor("attention.qkv", (rows, hidden), "int8_rows", tuple(parts), part_rows)
    yield Tensor("attention.output", (hidden, mixer.heads * mixer.value_width), "int8_rows")
    if mixer.bias:
        biases = tuple(f"{part}.bias" for part in parts)
        yield Tensor("attention.qkv.bias", (rows,), "f32", biases, part_rows)
    if mixer.output_bias:
        yield Tensor("attention.output.bias", (hidden,), "f32")
    if mixer.output_gate in ("head", "head_softplus"):
        yield Tensor("attention.gate", (mixer.heads, hidden), "plain")
    elif mixer.output_gate != "none":
        yield Tensor("attention.gate", (mixer.heads * mixer.value_width, hidden), "int8_rows")
    if mixer.qk_norm in ("head", "head_after_rope", "flat"):
        flat = mixer.qk_norm == "flat"
        yield Tensor("attention.q_norm", (q if flat else mixer.head_dim,), "plain")
        yield Tensor("attention.k_norm", (k if flat else mixer.head_dim,), "plain")
    if mixer.sinks:
        yield Tensor("attention.sinks", (mixer.heads,), "f32")
    if mixer.selection is not None:
        yield from _block_index(mixer.selection, hidden)


def _block_index(index: Selection, hidden: int) -> Iterator[Tensor]:
    """The index over blocks of keys: queries and keys from the block's own input, normed by head."""
    if index.reuses:
        return
    rows = (index.heads + index.key_heads) * index.dim
    part_rows = (index.heads * index.dim, index.key_heads * index.dim)
    yield Tensor("index.qk", (rows, hidden), "plain", ("index.q", "index.k"), part_rows)
    yield Tensor("index.q_norm", (index.dim,), "plain")
    yield Tensor("index.k_norm", (index.dim,), "plain")


def _latent(mixer: LatentAttention, hidden: int) -> Iterator[Tensor]:
    query = mixer.heads * (mixer.nope_dim + mixer.rope_dim)
    if mixer.q_rank is None:
        yield Tensor("attention.q", (query, hidden), "int8_rows")
    else:
        yield Tensor("attention.q_a", (mixer.q_rank, hidden), "int8_rows")
        yield Tensor("attention.q_b", (query, mixer.q_rank), "int8_rows")
        yield Tensor("attention.q_a_norm", (mixer.q_rank,), "plain")
    yield Tensor("attention.kv_a", (mixer.kv_rank + mixer.rope_dim, hidden), "int8_rows")
    # What makes keys and values of a latent. Keys the other way round: queries are taken to the latent.
    yield Tensor("attention.k_b", (mixer.heads * mixer.kv_rank, mixer.nope_dim), "int8_rows")
    yield Tensor("attention.v_b", (mixer.heads * mixer.value_dim, mixer.kv_rank), "int8_rows")
    yield Tensor("attention.kv_a_norm", (mixer.kv_rank,), "plain")
    yield Tensor("attention.output", (hidden, mixer.heads * mixer.value_dim), "int8_rows")
    if mixer.head_gate:
        yield Tensor("attention.gate", (mixer.heads, hidden), "plain")
    if mixer.bias:
        if mixer.q_rank is not None:
            yield Tensor("attention.q_a.bias", (mixer.q_rank,), "f32")
        yield Tensor("attention.kv_a.bias", (mixer.kv_rank + mixer.rope_dim,), "f32")
        yield Tensor("attention.output.bias", (hidden,), "f32")
    if mixer.selection is not None and mixer.q_rank is not None:
        yield from _token_index(mixer.selection, hidden, mixer.q_rank)


def _token_index(index: Selection, hidden: int, q_rank: int) -> Iterator[Tensor]:
    """The index over tokens or pools: queries from the query's latent, one key, weights a head."""
    if index.reuses:
        return
    yield Tensor("index.q", (index.heads * index.dim, q_rank), "plain")
    yield Tensor("index.k", (index.dim, hidden), "plain")
    yield Tensor("index.k_norm", (index.dim,), "plain")
    yield Tensor("index.k_norm.bias", (index.dim,), "f32")
    yield Tensor("index.weights", (index.heads, hidden), "plain")
    if index.kind == "pools":
        yield Tensor("index.pool_gate", (index.dim, hidden), "plain")
        yield Tensor("index.pool_position", (index.block, index.dim), "f32")


def _compressed(mixer: CompressedAttention, hidden: int) -> Iterator[Tensor]:
    yield Tensor("attention.q_a", (mixer.q_rank, hidden), "int8_rows")
    yield Tensor("attention.q_b", (mixer.heads * mixer.head_dim, mixer.q_rank), "int8_rows")
    yield Tensor("attention.kv", (mixer.head_dim, hidden), "int8_rows")
    grouped = mixer.groups * mixer.group_rank
    group_channels = mixer.heads * mixer.head_dim // mixer.groups
    yield Tensor("attention.output_a", (grouped, group_channels), "int8_rows")
    yield Tensor("attention.output_b", (hidden, grouped), "int8_rows")
    yield Tensor("attention.q_a_norm", (mixer.q_rank,), "plain")
    yield Tensor("attention.kv_norm", (mixer.head_dim,), "plain")
    yield Tensor("attention.sinks", (mixer.heads,), "f32")
    if mixer.ratio is None:
        return
    yield from _compressor("compressor", mixer.head_dim, mixer, hidden)
    if mixer.selection is not None:
        index = mixer.selection
        yield from _compressor("index.compressor", index.dim, mixer, hidden)
        yield Tensor("index.q", (index.heads * index.dim, mixer.q_rank), "plain")
        yield Tensor("index.weights", (index.heads, hidden), "plain")


def _compressor(prefix: str, dim: int, mixer: CompressedAttention, hidden: int) -> Iterator[Tensor]:
    width = 2 * dim if mixer.overlap else dim
    yield Tensor(f"{prefix}.kv", (width, hidden), "plain")
    yield Tensor(f"{prefix}.gate", (width, hidden), "plain")
    yield Tensor(f"{prefix}.position", (mixer.ratio or 1, width), "f32")
    yield Tensor(f"{prefix}.norm", (dim,), "plain")


def _gated_delta(mixer: GatedDelta, hidden: int) -> Iterator[Tensor]:
    value = mixer.value_heads * mixer.value_dim
    parts = ("delta.q", "delta.k", "delta.v", "delta.z")
    key = mixer.key_heads * mixer.key_dim
    part_rows = (key, key, value, value)
    yield Tensor("delta.qkvz", (mixer.conv_channels + value, hidden), "int8_rows", parts, part_rows)
    yield Tensor("delta.output", (hidden, value), "int8_rows")
    yield Tensor("delta.ba", (2 * mixer.value_heads, hidden), "plain", ("delta.b", "delta.a"))
    yield Tensor("delta.conv", (mixer.conv_channels, mixer.conv_width), "f32")
    yield Tensor("delta.a_log", (mixer.value_heads,), "f32")
    yield Tensor("delta.dt_bias", (mixer.value_heads,), "f32")
    yield Tensor("delta.gate_norm", (mixer.value_dim,), "plain")


def _channel_delta(mixer: ChannelDelta, hidden: int) -> Iterator[Tensor]:
    rows = mixer.heads * mixer.dim
    yield Tensor("delta.qkv", (3 * rows, hidden), "int8_rows", ("delta.q", "delta.k", "delta.v"))
    yield Tensor("delta.output", (hidden, rows), "int8_rows")
    convs = ("delta.conv_q", "delta.conv_k", "delta.conv_v")
    yield Tensor("delta.conv", (3 * rows, mixer.conv_width), "f32", convs)
    for part, rank in (("decay", mixer.decay_rank), ("gate", mixer.gate_rank)):
        if rank is None:
            yield Tensor(f"delta.{part}", (rows, hidden), "int8_rows")
            continue
        yield Tensor(f"delta.{part}_a", (rank, hidden), "plain")
        yield Tensor(f"delta.{part}_b", (rows, rank), "plain")
    yield Tensor("delta.beta", (mixer.heads, hidden), "plain")
    yield Tensor("delta.a_log", (mixer.heads,), "f32")
    yield Tensor("delta.dt_bias", (rows,), "f32")
    yield Tensor("delta.gate_norm", (mixer.dim,), "plain")


def _mamba2(mixer: Mamba2, hidden: int) -> Iterator[Tensor]:
    rows = mixer.inner + mixer.conv_channels
    yield Tensor("mamba.input", (rows, hidden), "int8_rows")
    # Apart, for what goes through an exponential is not rounded.
    yield Tensor("mamba.dt", (mixer.heads, hidden), "plain")
    yield Tensor("mamba.output", (hidden, mixer.inner), "int8_rows")
    yield Tensor("mamba.conv", (mixer.conv_channels, mixer.conv_width), "f32")
    if mixer.conv_bias:
        yield Tensor("mamba.conv.bias", (mixer.conv_channels,), "f32")
    if mixer.bias:
        yield Tensor("mamba.input.bias", (rows,), "f32")
        yield Tensor("mamba.output.bias", (hidden,), "f32")
    for part in ("a_log", "d", "dt_bias"):
        yield Tensor(f"mamba.{part}", (mixer.heads,), "f32")
    yield Tensor("mamba.gate_norm", (mixer.inner,), "plain")


def _short_conv(mixer: ShortConv, hidden: int) -> Iterator[Tensor]:
    yield Tensor("conv.input", (3 * mixer.channels, hidden), "int8_rows")
    yield Tensor("conv.output", (hidden, mixer.channels), "int8_rows")
    yield Tensor("conv.conv", (mixer.channels, mixer.width), "f32")
    if mixer.bias:
        for part, rows in (("input", 3 * mixer.channels), ("output", hidden), ("conv", mixer.channels)):
            yield Tensor(f"conv.{part}.bias", (rows,), "f32")


_TENSORS: dict[type, Callable[[Any, int], Iterator[Tensor]]] = {
    Attention: _attention,
    LatentAttention: _latent,
    CompressedAttention: _compressed,
    GatedDelta: _gated_delta,
    ChannelDelta: _channel_delta,
    Mamba2: _mamba2,
    ShortConv: _short_conv,
}
