"""The gated delta rule on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from krasis.formats.models.recurrent import GatedDelta
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import PassRows, gate_matrices, packed
from krasis.runtime.gpu.kernels.gated_delta import DeltaForm, DeltaPlace, DeltaRows

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuGatedDelta:
    """See ``rows.StateBlock``. Gates: of the step and the decay, a matrix."""

    def __init__(self, model: GpuModel, layer: int, mixer: GatedDelta) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm, self._ba = weights.optional("attention.norm"), weights.plain("delta.ba")
        self.projection, self._output = weights.int8("delta.qkvz"), weights.int8("delta.output")
        self.layer, self.num_mixed = layer, mixer.conv_channels
        self.num_out = mixer.value_heads * mixer.value_dim
        self.gates: tuple[int, ...] = (2 * mixer.value_heads,)
        self._form = DeltaForm(
            mixer,
            conv=weights.plain("delta.conv"),
            a_log=weights.plain("delta.a_log"),
            dt_bias=weights.plain("delta.dt_bias"),
            gate_norm=weights.plain("delta.gate_norm"),
            eps=self._eps,
        )

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        gates = gate_matrices(b.delta_gates, self.gates)
        if self._norm is not None:  # none between residual streams
            self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.normed)
        rows.small_product(b.normed, self._ba, gates[0])
        # What follows lies where normed was.
        if self._norm is not None:
            self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
        out = packed(b.attended, self.num_out)
        rows.apply_state(self, gates, out)
        rows.product(out, self._output, b.hidden, residual=b.hidden)

    def advance(
        self,
        stream: Stream,
        projected: torch.Tensor,
        gates: Sequence[torch.Tensor],
        place: DeltaPlace | DeltaRows,
        mixed: torch.Tensor,
        out: torch.Tensor,
        chunks: torch.Tensor | None = None,
    ) -> None:
        """See ``StateBlock``."""
        self._kernels.gated_delta(stream, projected, gates[0], self._form, place, mixed, out, chunks)
