"""How a chunk's experts are computed: a pure choice by expected seconds.

- streamed: every expert that is not resident is copied, under the compute, two groups ahead across layers;
- routed: only those that the chunk's tokens chose. The host must see the choice; from a layer's last copy to
  the next layer's choice only a few likely experts can be copied;
- cpu: the CPU's copy of the experts, nothing but activations crosses the link.

A layer's parts cost what the planner says (``planning/cost.py``); what differs is which of them run under
each other. Rates are those of the plan's hardware: measured, given or assumed. How many experts tokens choose
is what the passes before let expect; without any, as many as by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning import cost
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.sizes import LayerSizes, ModelSizes
from krasis.runtime.planning.types import ExpertPath

__all__ = ["PATHS", "ExpertPath", "PathChoice", "PathModel"]

PATHS: tuple[ExpertPath, ...] = ("streamed", "routed", "cpu")
HOST_SYNC_S = 1.5e-3
"""From a layer's choice of experts to the first of their copies, by way of the host, beside the device's own
work (measured on an H200 with 16 cores: 1.4 ms a layer were missing with 0.15 ms).
"""
LAYER_SUBMIT_S = 250e-6
"""The host's time for one layer's launches, about 25 calls through Python (assumed): what a short chunk waits
for.
"""
AHEAD_SHARE = 4
"""The part of a buffer's places that is kept for experts ahead of their layer's choice."""
ROUTED_MAY_TAKE = 1.03
"""So many times the seconds of streaming: hardly more, should all experts be chosen after all. What is known
is how often each is; a prompt chooses fewer than as many single tokens would.
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
        self,
        num_tokens: int,
        start: int,
        num_resident: int,
        open_paths: tuple[ExpertPath, ...],
        num_copied: float | None = None,
        loading_s: float = 0.0,
    ) -> PathChoice:
        """The fastest of open_paths for num_tokens tokens at positions start...
        num_resident: of all layers. num_copied: experts that are not resident and will be chosen in a layer;
        None: as many as by chance. loading_s: until every layer's experts can be copied.
        """
        expected = {
            path: self.seconds(path, num_tokens, start, num_resident, num_copied) for path in open_paths
        }
        best = min(expected, key=lambda path: expected[path])
        if best == "streamed" and expected.get("routed", math.inf) <= ROUTED_MAY_TAKE * expected[best]:
            best = "routed"
        if best != "cpu" and expected.get("cpu", math.inf) < max(expected[best], loading_s):
            best = "cpu"
        return PathChoice(best, expected)

    def seconds(
        self,
        path: ExpertPath,
        num_tokens: int,
        start: int,
        num_resident: int,
        num_copied: float | None = None,
    ) -> float:
        """Expected seconds of a chunk."""
        own = sum(count * self._own(experts.count) for count, experts in self.sizes.expert_layers)
        cold = 1.0 - num_resident / own
        return sum(
            kind.count * self._layer_s(kind, path, num_tokens, start, cold, num_copied)
            for kind in self.sizes.layers
        )

    def num_ahead(self, num_tokens: int, start: int) -> int:
        """Experts that are copied, on the routed way, while the link has nothing else to do."""
        kinds = [kind for kind in self.sizes.layers if kind.experts is not None]
        return min(int(self._idle_s(kind, num_tokens, start) / self._record_s(kind)) for kind in kinds)

    def _own(self, num_experts: int) -> float:
        """This rank's share of a layer's experts."""
        return num_experts * self.num_experts / self.sizes.most_experts

    def _idle_s(self, kind: LayerSizes, num_tokens: int, start: int) -> float:
        """From a layer's last copy to when the host has submitted those of the next one's choice."""
        gpu, experts = self.hardware.gpus[0], kind.experts
        compute = sum(cost.dense_layer_s(self.sizes, kind, gpu, start, num_tokens, self.num_ranks))
        if experts is not None:
            compute += cost.expert_products_s(experts, gpu, num_tokens, self._own(experts.count))
        return max(compute, LAYER_SUBMIT_S) + HOST_SYNC_S

    def _record_s(self, kind: LayerSizes) -> float:
        """One expert's way over the link."""
        return cost.copy_s(kind.experts, self.hardware.gpus[0], 1.0) if kind.experts is not None else 0.0

    def _layer_s(
        self,
        kind: LayerSizes,
        path: ExpertPath,
        num_tokens: int,
        start: int,
        cold: float,
        num_copied: float | None,
    ) -> float:
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
        if num_copied is None:
            num_copied = cold * cost.distinct_experts(experts, num_tokens) * own / experts.count
        idle, record = self._idle_s(kind, num_tokens, start), self._record_s(kind)
        ahead = min(max(0.0, idle - record), own / AHEAD_SHARE * record)
        # Of what is copied ahead, so much would be copied anyway.
        share = min(1.0, num_copied / (cold * own)) if cold > 0 else 0.0
        dma = num_copied * record - share * ahead
        return idle + max(0.0, dma)
