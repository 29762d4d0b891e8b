"""Mamba-2 on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from krasis.formats.models.recurrent import Mamba2
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import PassRows, gate_matrices, packed
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows
from krasis.runtime.gpu.kernels.mamba import MambaForm, mixed_columns

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuMamba2:
    """See ``rows.StateBlock``. Gates: the steps, a matrix."""

    def __init__(self, model: GpuModel, layer: int, mixer: Mamba2) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm, self._dt = weights.plain("attention.norm"), weights.plain("mamba.dt")
        self.projection, self._output = weights.int8("mamba.input"), weights.int8("mamba.output")
        self.layer, self.num_mixed, self.num_out = layer, mixed_columns(mixer), mixer.inner
        self.gates: tuple[int, ...] = (mixer.heads,)
        self._form = MambaForm(
            mixer,
            conv=weights.plain("mamba.conv"),
            conv_bias=weights.optional("mamba.conv.bias"),
            a_log=weights.plain("mamba.a_log"),
            dt_bias=weights.plain("mamba.dt_bias"),
            skip=weights.plain("mamba.d"),
            gate_norm=weights.plain("mamba.gate_norm"),
            eps=self._eps,
        )

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        gates = gate_matrices(b.delta_gates, self.gates)
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.normed)
        rows.small_product(b.normed, self._dt, gates[0])
        # What follows lies where normed was.
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
        self._kernels.mamba2(stream, projected, gates[0], self._form, place, mixed, out)
