"""The gated delta rule on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.models.recurrent import GatedDelta
from krasis.runtime.gpu.blocks.rows import PassRows, packed
from krasis.runtime.gpu.kernels.gated_delta import DeltaForm

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuGatedDelta:
    """layer: its number. qkvz, form: what a pass needs for the rule."""

    def __init__(self, model: GpuModel, layer: int, mixer: GatedDelta) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm, self._ba = weights.plain("attention.norm"), weights.plain("delta.ba")
        self.qkvz, self._output = weights.int8("delta.qkvz"), weights.int8("delta.output")
        self.layer = layer
        self.form = DeltaForm(
            mixer,
            conv=weights.plain("delta.conv"),
            a_log=weights.plain("delta.a_log"),
            dt_bias=weights.plain("delta.dt_bias"),
            gate_norm=weights.plain("delta.gate_norm"),
            eps=self._eps,
        )

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b, mixer = rows.own, self.form.mixer
        gates = packed(b.delta_gates, 2 * mixer.value_heads)
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.normed)
        rows.small_product(b.normed, self._ba, gates)
        # What follows lies where normed was.
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
        out = packed(b.attended, mixer.value_heads * mixer.value_dim)
        rows.apply_delta(self, gates, out)
        rows.product(out, self._output, b.hidden, residual=b.hidden)
