"""What a plan says if assumed rates are lower or higher: ranges where an assumption decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from krasis.runtime.planning.hardware import Figure, HardwareSpec
from krasis.runtime.planning.planner import make_plan
from krasis.runtime.planning.types import Plan

LOWER, HIGHER = 0.75, 1.1
"""By how much attainable rates of machines that nobody measured are off: more often below than above."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Tokens a second with every assumed rate at LOWER and at HIGHER of its value."""

    prefill_tokens_per_s: tuple[float, float]
    decode_tokens_per_s: tuple[float, float]


def ranges_of(plan: Plan) -> Ranges | None:
    """None where nothing is assumed. What has to fit is given, so that every plan can be made."""
    low, high = (_scaled(plan.hardware, share) for share in (LOWER, HIGHER))
    if low == plan.hardware:
        return None
    slow, fast = (make_plan(plan.sizes, one, plan.workload) for one in (low, high))
    return Ranges(
        (slow.prefill.tokens_per_s, fast.prefill.tokens_per_s),
        (slow.decode.tokens_per_s, fast.decode.tokens_per_s),
    )


def _scaled(hardware: HardwareSpec, share: float) -> HardwareSpec:
    def one(figure: Figure) -> Figure:
        return replace(figure, value=share * figure.value) if figure.source == "assumed" else figure

    gpus = tuple(
        replace(
            gpu,
            link_gbps=one(gpu.link_gbps),
            memory_gbps=one(gpu.memory_gbps),
            bf16_tflops=one(gpu.bf16_tflops),
        )
        for gpu in hardware.gpus
    )
    return replace(hardware, gpus=gpus, ram_gbps=one(hardware.ram_gbps), cpu_gmacs=one(hardware.cpu_gmacs))
