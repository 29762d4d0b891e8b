"""Gated short convolutions on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from krasis.formats.models.recurrent import ShortConv
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import PassRows, packed
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuShortConv:
    """See ``rows.StateBlock``."""

    def __init__(self, model: GpuModel, layer: int, mixer: ShortConv) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm, self._conv = weights.plain("attention.norm"), weights.plain("conv.conv")
        self.projection, self._output = weights.int8("conv.input"), weights.int8("conv.output")
        self.layer, self.num_mixed, self.num_out = layer, 0, mixer.channels
        self.gates: tuple[int, ...] = ()

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
        out = packed(b.attended, self.num_out)
        rows.apply_state(self, (), out)
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
        self._kernels.short_conv(stream, projected, self._conv, place, out)
