"""The GPU's choice of experts has the bits of the CPU's: a token is routed alike wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.formats.models.mlps import Router
from krasis.formats.native import Pool
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels


def logits_like_a_routers(random: np.random.Generator, num_tokens: int, num_experts: int) -> np.ndarray:
    """Some rows flat, some steep, some so steep that most experts vanish; ties; an infinity."""
    logits = random.normal(size=(num_tokens, num_experts)) * random.choice([0.01, 1, 10, 80], (num_tokens, 1))
    logits = np.where(random.uniform(size=logits.shape) < 0.2, np.round(logits), logits).astype(np.float32)
    logits[0, : num_experts // 2] = logits[0, 0]
    logits[1, num_experts // 3] = -np.inf
    return logits


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (6, 2), (33, 33), (160, 6), (512, 64), (16, 1)])
def test_bits(pool: Pool, num_experts: int, top_k: int, normalize: bool) -> None:
    num_tokens = 21
    logits = logits_like_a_routers(np.random.default_rng(num_experts), num_tokens, num_experts)
    ids, weights = np.empty((num_tokens, top_k), np.int32), np.empty((num_tokens, top_k), np.float32)
    Kernels(pool).route(logits, Router(top_k=top_k, renormalise=normalize), ids, weights)

    device = DeviceDouble()
    stream = device.stream("compute")
    source = torch.from_numpy(logits)
    on_device = device.empty(logits.shape, torch.float32)
    gpu_ids = device.empty(ids.shape, torch.int32)
    gpu_weights = device.empty(weights.shape, torch.float32)

    def put(_: int) -> None:
        on_device.copy_(source)

    stream.launch("put", put, reads=(), writes=(on_device,))
    GpuKernels(device).route(stream, on_device, Router(top_k, renormalise=normalize), gpu_ids, gpu_weights)
    device.synchronize()
    assert (gpu_ids.numpy() == ids).all()
    assert (gpu_weights.numpy().view(np.uint32) == weights.view(np.uint32)).all()
    device.close()
