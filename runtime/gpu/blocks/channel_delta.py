"""The delta rule with a decay of each channel (Kimi Delta Attention) on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from krasis.formats.limits import align_up
from krasis.formats.models.recurrent import ChannelDelta
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import PassRows, gate_matrices, packed
from krasis.runtime.gpu.kernels.gated_delta import DeltaForm, DeltaPlace, DeltaRows

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuChannelDelta:
    """See ``rows.StateBlock``. Gates: of the step, of the decay by channel and of the output."""

    def __init__(self, model: GpuModel, layer: int, mixer: ChannelDelta) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm = weights.plain("attention.norm")
        names = ("beta", "decay_a", "decay_b", "gate_a", "gate_b")
        self._small = {name: weights.plain(f"delta.{name}") for name in names}
        self.projection, self._output = weights.int8("delta.qkv"), weights.int8("delta.output")
        values = mixer.heads * mixer.dim
        self.layer, self.num_mixed, self.num_out = layer, mixer.conv_channels, values
        self.gates: tuple[int, ...] = (mixer.heads, values, values)
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
        b, small = rows.own, self._small
        gates = gate_matrices(b.delta_gates, self.gates)
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.normed)
        rows.small_product(b.normed, small["beta"], gates[0])
        for name, out in (("decay", gates[1]), ("gate", gates[2])):
            rank = small[f"{name}_a"].shape[0]
            before = (align_up(self.gates[0], 4), *self.gates[1:])  # a product's input is aligned
            low = gate_matrices(b.delta_gates, (*before, rank))[-1]
            rows.small_product(b.normed, small[f"{name}_a"], low)
            rows.small_product(low, small[f"{name}_b"], out)
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
        """See ``StateBlock``: row by row, however many there are."""
        beta, decays, z = gates
        self._kernels.gated_delta(stream, projected, beta, self._form, place, mixed, out, decays=decays, z=z)
