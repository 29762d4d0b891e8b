"""Qwen3-235B-A22B by hand: the figures of its configuration, written out, not taken from the code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from krasis.runtime.planning import Figure, HardwareSpec, ModelSizes, describe_gpu, describe_host
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.sizes import ExpertSizes, LayerSizes

GPU_EXPERT_BYTES = (
    9_732_096  # 3 * 4096 * 1536 / 2 nibbles + a 2-byte scale for each 128: already a multiple of 4096
)
CPU_EXPERT_BYTES = 20_054_016  # 3 * 4096 * 1536 / 32 blocks of 34 bytes: already a multiple of 4096

MachineMaker = Callable[..., HardwareSpec]


@pytest.fixture(scope="session")
def qwen_235b() -> ModelSizes:
    """INT4 g128 on the GPU, Q8 tiles on the CPU."""
    spec = shape("qwen3-235b-a22b")
    experts = ExpertSizes(128, 8, 3 * 4096 * 1536, GPU_EXPERT_BYTES, CPU_EXPERT_BYTES)
    dense_macs = 4096 * (9216 + 8192 + 128)
    return ModelSizes(
        spec=spec,
        layers=(LayerSizes(spec.layers[0], 94, 72_421_888, dense_macs, experts),),
        end_bytes=151_936 * (4096 + 4) + 2 * 4096,
        embedding_bytes=151_936 * 4096 * 2,
        gpu_layout="marlin-u4b8-g128-bf16",
        cpu_layout="cpu-q8-r32-b32",
        source="shape",
    )


def _machine(
    num_gpus: int,
    vram_bytes: int = 16 * 2**30,
    *,
    link: float = 13.0,
    memory: float = 224.0,
    tflops: float = 34.0,
    ram_bytes: int = 2**40,
    ram_gbps: float = 140.0,
    cores: int = 64,
    gmacs: float = 3200.0,
) -> HardwareSpec:
    gpu = describe_gpu(vram_bytes, link_gbps=link, memory_gbps=memory, bf16_tflops=tflops)
    return describe_host(
        [gpu] * num_gpus,
        ram_bytes=Figure(ram_bytes, "given"),
        num_cores=Figure(cores, "given"),
        ram_gbps=Figure(ram_gbps, "given"),
        cpu_gmacs=Figure(gmacs, "given"),
        disk_gbps=Figure(3.0, "given"),
    )


@pytest.fixture(scope="session")
def machine() -> MachineMaker:
    """EPYC 7742 with ``num_gpus`` RTX 2000 Ada, or what the arguments say."""
    return _machine
