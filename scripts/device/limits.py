"""What a prefill costs at least: bytes over the link, and operations on the matrix units."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.gpu.opening import outside_bytes
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.mixing import mixer_macs
from krasis.runtime.planning.planner import whole_layer_vram_bytes
from krasis.runtime.planning.sizes import ModelSizes, sizes_of_bundle
from krasis.runtime.planning.types import Workload


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Of one prompt in one pass. streamed_bytes: GPU experts of all layers. flops: two a multiply-add."""

    streamed_bytes: int
    expert_flops: int
    dense_flops: int
    attention_flops: int

    @property
    def flops(self) -> int:
        return self.expert_flops + self.dense_flops + self.attention_flops

    def limit_s(self, pinned_gbps: float, matmul_tflops: float) -> float:
        """The slower of the two, as if they overlapped perfectly."""
        return max(self.streamed_bytes / (pinned_gbps * 1e9), self.flops / (matmul_tflops * 1e12))

    def to_json(self, pinned_gbps: float, matmul_tflops: float) -> dict[str, Any]:
        """The parts, in units and in seconds."""
        peak = matmul_tflops * 1e12
        return {
            **asdict(self),
            "copy_s": self.streamed_bytes / (pinned_gbps * 1e9),
            "expert_s": self.expert_flops / peak,
            "dense_s": self.dense_flops / peak,
            "attention_s": self.attention_flops / peak,
            "limit_s": self.limit_s(pinned_gbps, matmul_tflops),
        }


def streaming_vram_bytes(bundle: Bundle, context: int, device: str, num_ranks: int = 1) -> int:
    """VRAM that holds dense weights, cache, one pass and two layers of experts, and no expert for good.

    So that a card larger than the model still streams every expert from host memory. device: ``cuda``, whose
    context needs room too, or ``double``.
    """
    sizes = sizes_of_bundle(bundle.manifest)
    needed = whole_layer_vram_bytes(sizes, Workload(context, context, "bf16"))
    if device != "cuda":
        return needed
    # The context is counted once: as what is outside, not by the plan's reserve too.
    return needed + outside_bytes(num_ranks) - (assumed.GPU_RESERVE_BYTES - assumed.GPU_OPERATORS_BYTES)


def prefill_work(sizes: ModelSizes, num_tokens: int) -> PrefillWork:
    """All experts once over the link; every token through its experts, projections and causal attention.

    The output head runs for one token and is left out, as are norms and the routing.
    """
    expert_macs = sum(count * one.top_k * one.weights for count, one in sizes.expert_layers)
    dense_macs = sum(kind.count * kind.dense_macs for kind in sizes.layers)
    attention_macs = sum(kind.count * mixer_macs(kind.layer.mixer, 0, num_tokens) for kind in sizes.layers)
    return PrefillWork(
        streamed_bytes=sizes.gpu_experts_bytes,
        expert_flops=2 * num_tokens * expert_macs,
        dense_flops=2 * num_tokens * dense_macs,
        attention_flops=2 * attention_macs,
    )
