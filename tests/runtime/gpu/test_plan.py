"""What the runtime tells the planner of its machine, where several ranks must plan alike."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from krasis.runtime.device.api import Device
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu import plan
from krasis.runtime.gpu.parallel import SingleRank
from krasis.runtime.planning import assumptions, describe_gpu
from krasis.runtime.planning.hardware import Figure, HardwareSpec
from krasis.runtime.planning.planner import make_plan
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.sizes import DEFAULT_GPU_LAYOUT, sizes_of_shape
from krasis.runtime.planning.types import Workload
from krasis.runtime.settings import EngineSettings

GIB = 2**30
VRAM_BYTES = GIB


class SlowerNeighbour(SingleRank):
    """The first of two ranks; the other one's GPU has half of everything."""

    def __init__(self) -> None:
        super().__init__(8)
        self.num_ranks = 2

    def agree(self, value: int) -> int:
        return value // 2


def machine_of(limit_bytes: int | None, free_bytes: int, parallel: SingleRank) -> HardwareSpec:
    """What is planned for on a fake GPU of which so much is free, under a limit."""
    device = SimpleNamespace(
        torch_device=torch.device("cuda", 0), total_bytes=24 * GIB, free_bytes=lambda: free_bytes
    )
    settings = EngineSettings(device="cuda", vram_bytes=limit_bytes)
    return plan.describe_machine(cast("Device", device), settings, parallel)


def test_the_context_of_a_running_process_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a limit all is used but the context and what operators need."""
    monkeypatch.setattr(plan, "_rates", lambda device: describe_gpu(device.total_bytes))
    monkeypatch.setattr("krasis.runtime.device.cuda.release_library_memory", lambda _: None)
    free = 8 * GIB - assumptions.GPU_CONTEXT_BYTES  # as CudaDevice says under a limit of 8 GiB
    machine = replace(machine_of(8 * GIB, free, SingleRank(8)), ram_bytes=Figure(2**40, "given"))
    sizes = sizes_of_shape(shape("qwen3-30b-a3b"), DEFAULT_GPU_LAYOUT)
    [gpu] = make_plan(sizes, machine, Workload(4096, 512, "bf16")).gpus
    model_bytes = gpu.vram_bytes - gpu.reserve_bytes - gpu.spare_bytes
    assert 0 <= gpu.spare_bytes < sizes.gpu_expert_bytes
    assert free - model_bytes - gpu.spare_bytes == assumptions.GPU_OPERATORS_BYTES
    # A limit far below what is free bounds the whole; without one what is free is used as well.
    assert machine_of(4 * GIB, 20 * GIB, SingleRank(8)).gpus[0].vram_bytes == 4 * GIB
    counted = assumptions.GPU_RESERVE_BYTES - assumptions.GPU_OPERATORS_BYTES
    assert machine_of(None, 20 * GIB, SingleRank(8)).gpus[0].vram_bytes == 20 * GIB + counted
    # What NCCL takes is in a limit's account alone.
    assert machine_of(None, 20 * GIB, SlowerNeighbour()).gpus[0].vram_bytes == 10 * GIB
    assert machine_of(8 * GIB, free, SlowerNeighbour()).gpus[0].vram_bytes == (free + counted) // 2


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
