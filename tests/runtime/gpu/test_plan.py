"""What the runtime tells the planner of its machine, where several ranks must plan alike."""

from __future__ import annotations

from typing import Any

import pytest

from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu import plan
from krasis.runtime.gpu.parallel import SingleRank
from krasis.runtime.planning import describe_gpu
from krasis.runtime.settings import EngineSettings

VRAM_BYTES = 2**30


class SlowerNeighbour(SingleRank):
    """The first of two ranks; the other one's GPU has half of everything."""

    def __init__(self) -> None:
        super().__init__(8)
        self.num_ranks = 2

    def agree(self, value: int) -> int:
        return value // 2


def rates(gpu: Any) -> tuple[float, float, float]:
    return gpu.link_gbps.value, gpu.memory_gbps.value, gpu.bf16_tflops.value


def test_all_ranks_plan_for_the_least_memory_and_the_slowest_rates() -> None:
    device = DeviceDouble(total_bytes=VRAM_BYTES)
    expected = describe_gpu(VRAM_BYTES)
    alone = plan.describe_machine(device, EngineSettings(), SingleRank(8))
    assert rates(alone.gpus[0]) == rates(expected)
    shared = plan.describe_machine(device, EngineSettings(), SlowerNeighbour())
    assert len(shared.gpus) == 2
    for gpu in shared.gpus:
        assert gpu.vram_bytes == VRAM_BYTES // 2
        assert rates(gpu) == pytest.approx([rate / 2 for rate in rates(expected)])
