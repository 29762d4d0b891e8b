"""Where the time of a decoded token went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """Where a token's time went, by the host's clock, and which side computed how many experts.

    submit_s: replaying the graph. cpu_experts_s: the CPU's experts. wait_gpu_s: the CPU waited for the GPU:
    its part of the critical path up to the last layer. tail_s: from the last hand-over (or, without one, from
    the replay) until the logits are there.
    """

    total_s: float = 0.0
    submit_s: float = 0.0
    cpu_experts_s: float = 0.0
    wait_gpu_s: float = 0.0
    tail_s: float = 0.0
    num_cpu_experts: float = 0.0
    num_gpu_experts: float = 0.0
