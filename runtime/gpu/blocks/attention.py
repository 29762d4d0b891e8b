"""Grouped-query attention on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.gpu.blocks.rows import PassRows, packed
from krasis.runtime.gpu.kernels.attention_rows import QkvForm

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuAttention:
    """layer: its number. heads, form, scale, window, sinks: what a pass needs to attend."""

    def __init__(self, model: GpuModel, layer: int, mixer: Attention) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm = weights.optional("attention.norm")  # none between residual streams
        self._qkv, self._output = weights.int8("attention.qkv"), weights.int8("attention.output")
        self._output_bias = weights.optional("attention.output.bias")
        self.layer, self.scale, self.window = layer, mixer.scale, mixer.window
        self.sinks = weights.optional("attention.sinks")
        self._post_norm = weights.optional("attention.post_norm")
        self.heads = Heads(mixer.heads, mixer.kv_heads, mixer.head_dim, shared_kv=mixer.shared_kv)
        self._gate = weights.int8("attention.gate") if mixer.output_gate == "channel" else None
        if mixer.rope is None:
            cos = sin = model.device.empty((model.cache.capacity, 0), torch.float32)
        else:
            cos, sin = model.weights.rope(mixer.rope)
        self.form = QkvForm(
            self._eps,
            cos,
            sin,
            weights.optional("attention.q_norm"),
            weights.optional("attention.k_norm"),
            norm=_norm_kind(mixer),
            bias=weights.optional("attention.qkv.bias"),
            clip=mixer.clip or 0.0,
            interleaved=mixer.rope is not None and mixer.rope.style == "interleaved",
            value_norm=mixer.value_norm,
        )

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        qkv = packed(b.qkv, self.heads.qkv_size)
        attended = packed(b.attended, self.heads.attention_size)
        gates = None
        if self._gate is None and self._norm is not None:
            rows.normed_product(self._norm, self._eps, self._qkv, qkv)
        else:
            if self._norm is not None:
                self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
            rows.product(b.x, self._qkv, qkv)
        if self._gate is not None:
            gates = packed(b.qkv, self.heads.attention_size, after=self.heads.qkv_size)
            rows.product(b.x, self._gate, gates)
        rows.attend(self, qkv, attended)
        if gates is not None:
            self._kernels.gate_rows(rows.stream, attended, gates)
        if self._post_norm is not None:
            self._add_normed(rows, attended, self._post_norm)
            return
        rows.product(attended, self._output, b.hidden, residual=b.hidden)
        if self._output_bias is not None:
            self._kernels.add_rows(rows.stream, b.hidden, None, bias=self._output_bias)

    def _add_normed(self, rows: PassRows, attended: torch.Tensor, norm: torch.Tensor) -> None:
        """hidden += norm(output(attended))."""
        b = rows.own
        rows.product(attended, self._output, b.added)
        if self._output_bias is not None:
            self._kernels.add_rows(rows.stream, b.added, None, bias=self._output_bias)
        self._kernels.rms_norm(rows.stream, b.added, norm, self._eps, b.added)
        self._kernels.add_rows(rows.stream, b.hidden, b.added)


def _norm_kind(mixer: Attention) -> Literal["head", "flat", "head_after_rope"]:
    """Of q and k; any where there are none."""
    if mixer.qk_norm == "unweighted_after_rope":
        raise UnsupportedModelError("the GPU has no such norms of q and k", got=mixer.qk_norm)
    return "head" if mixer.qk_norm == "none" else mixer.qk_norm
