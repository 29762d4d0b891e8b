"""How a chunk's experts are computed: a pure choice by expected seconds.

- streamed: every expert that is not resident is copied, under the compute, two groups ahead across layers;
- routed: only those that the chunk's tokens chose. The host must see the choice, so nothing is copied ahead
  of a layer's router, and a layer's copies run under its own products alone;
- cpu: the CPU's copy of the experts, nothing but activations crosses the link.

A layer's parts cost what the planner says (``planning/cost.py``); what differs is which of them run under
each other. Rates are those of the plan's hardware: measured, given or assumed. Random routing is assumed:
real routing touches fewer experts, in favour of the latter two.
"""

from __future__ import annotations

from dataclasses import dataclass

from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning import cost
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.sizes import LayerSizes, ModelSizes
from krasis.runtime.planning.types import ExpertPath

__all__ = ["PATHS", "ExpertPath", "PathChoice", "PathModel"]

PATHS: tuple[ExpertPath, ...] = ("streamed", "routed", "cpu")
HOST_SYNC_S = 60e-6
"""The device waits while the host sees a layer's choice of experts and submits the copies (assumed)."""
LAYER_SUBMIT_S = 250e-6
"""The host's time for one layer's launches, about 25 calls through Python (assumed): what a short chunk waits
for.
"""


@dataclass(frozen=True, slots=True)
class PathChoice:
    """The path taken and the seconds expected of every path that was open."""

    path: ExpertPath
    expected_s: dict[ExpertPath, float]

    def __str__(self) -> str:
        others = ", ".join(f"{path} {seconds:.4f} s" for path, seconds in self.expected_s.items())
        return f"{self.path} ({others})"


@dataclass(frozen=True, slots=True)
class PathModel:
    """One rank's share. num_experts: of each layer, this rank's. hardware.gpus[0] is this rank's GPU."""

    sizes: ModelSizes
    hardware: HardwareSpec
    num_ranks: int
    num_experts: int

    def choose(
        self, num_tokens: int, start: int, num_resident: int, open_paths: tuple[ExpertPath, ...]
    ) -> PathChoice:
        """The fastest of open_paths for num_tokens tokens at positions start...
        num_resident: of all layers.
        """
        expected = {path: self.seconds(path, num_tokens, start, num_resident) for path in open_paths}
        return PathChoice(min(expected, key=lambda path: expected[path]), expected)

    def seconds(self, path: ExpertPath, num_tokens: int, start: int, num_resident: int) -> float:
        """Expected seconds of a chunk."""
        own = sum(count * self._own(experts.count) for count, experts in self.sizes.expert_layers)
        cold = 1.0 - num_resident / own
        return sum(
            kind.count * self._layer_s(kind, path, num_tokens, start, cold) for kind in self.sizes.layers
        )

    def _own(self, num_experts: int) -> float:
        """This rank's share of a layer's experts."""
        return num_experts * self.num_experts / self.sizes.most_experts

    def _layer_s(self, kind: LayerSizes, path: ExpertPath, num_tokens: int, start: int, cold: float) -> float:
        """One layer. cold: the share of experts that are not resident."""
        gpu, experts = self.hardware.gpus[0], kind.experts
        # The CPU's experts serve one rank, which works alone.
        num_ranks = 1 if path == "cpu" else self.num_ranks
        compute = sum(cost.dense_layer_s(self.sizes, kind, gpu, start, num_tokens, num_ranks))
        if experts is None:
            return max(compute, LAYER_SUBMIT_S)
        if path == "cpu":
            on_cpu = cost.cpu_experts_s(experts, self.hardware, num_tokens)
            return max(compute + on_cpu + assumed.HANDOVER_S, LAYER_SUBMIT_S)
        own = self._own(experts.count)
        products = cost.expert_products_s(experts, gpu, num_tokens, own)
        if path == "streamed":
            dma = cost.copy_s(experts, gpu, cold * own)
            return max(dma, compute + products, LAYER_SUBMIT_S)
        touched = cost.distinct_experts(experts, num_tokens) * own / experts.count
        dma = cost.copy_s(experts, gpu, cold * touched)
        return max(compute, LAYER_SUBMIT_S) + HOST_SYNC_S + max(dma, products)
