"""A bundle's dense weights on the device, in one block of memory; the embedding stays mapped on the host.

``runtime/cpu/weights.py`` has checked every shape and dtype before a byte gets here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import FormatError
from krasis.formats.layouts import ExpertRecord, MarlinLayout
from krasis.runtime.cpu.rope import rope_of, rope_tables
from krasis.runtime.cpu.weights import FloatWeight, Int8Weight, LayerWeights, ModelWeights
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.upload import TORCH_DTYPES, Uploader

Array = npt.NDArray[Any]
ALIGNMENT_BYTES = 256
_TORCH_OF = {
    np.dtype(np.int8): torch.int8,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
}


@dataclass(frozen=True, slots=True)
class GpuInt8:
    """An INT8-rows weight on the device. codes int8 [n/32, k/4, 32, 4]; scales f32 [n]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def num_rows(self) -> int:
        """n."""
        return int(self.scales.shape[0])


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """One layer's dense weights on the device. Norms f32; router [num_experts,
    hidden] in its own precision.
    """

    attention_norm: torch.Tensor
    qkv: GpuInt8
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    output: GpuInt8
    experts_norm: torch.Tensor
    router: torch.Tensor


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """A model's dense weights. cos, sin f32 [positions, head_dim/2]. embedding: on the host.

    expert_layout and record: the form of the experts that are streamed.
    """

    embedding: FloatWeight
    layers: tuple[GpuLayer, ...]
    final_norm: torch.Tensor
    lm_head: GpuInt8
    cos: torch.Tensor
    sin: torch.Tensor
    expert_layout: MarlinLayout
    record: ExpertRecord
    num_bytes: int


def load_gpu_weights(weights: ModelWeights, device: Device, stream: Stream, num_positions: int) -> GpuWeights:
    """Copies the dense weights; returns when they have arrived.

    weights: with the experts of the gpu tier. num_positions: of the rotary tables. Raises
    OutOfDeviceMemoryError, and FormatError if the experts are of another tier.
    """
    layout, arch = weights.expert_layout, weights.architecture
    if not isinstance(layout, MarlinLayout):
        raise FormatError("the GPU streams Marlin experts only", got=layout.layout_id)
    cos, sin = rope_tables(rope_of(weights.spec), num_positions)
    plan = _Block()
    layers = [_layer(plan, layer) for layer in weights.layers]
    lm_head = _int8(plan, weights.lm_head)
    final_norm, device_cos, device_sin = (plan.array(array) for array in (weights.final_norm, cos, sin))
    plan.fill(device, stream)
    return GpuWeights(
        embedding=weights.embedding,
        layers=tuple(make() for make in layers),
        final_norm=final_norm(),
        lm_head=lm_head(),
        cos=device_cos(),
        sin=device_sin(),
        expert_layout=layout,
        record=layout.expert_record(arch.hidden_size, arch.expert_intermediate_size),
        num_bytes=plan.num_bytes,
    )


def _int8(block: _Block, weight: Int8Weight) -> Callable[[], GpuInt8]:
    codes, scales = block.array(weight.codes), block.array(weight.scales)
    return lambda: GpuInt8(codes(), scales())


def _layer(block: _Block, layer: LayerWeights) -> Callable[[], GpuLayer]:
    norms = [
        block.array(norm)
        for norm in (
            layer.vector("attention.norm"),
            layer.vector("attention.q_norm"),
            layer.vector("attention.k_norm"),
            layer.vector("experts.norm"),
        )
    ]
    qkv, output = _int8(block, layer.int8("attention.qkv")), _int8(block, layer.int8("attention.output"))
    router = block.array(
        layer.matrix("experts.router").data, TORCH_DTYPES[layer.matrix("experts.router").dtype]
    )

    def make() -> GpuLayer:
        attention_norm, q_norm, k_norm, experts_norm = (norm() for norm in norms)
        return GpuLayer(attention_norm, qkv(), q_norm, k_norm, output(), experts_norm, router())

    return make


class _Block:
    """Arrays to be placed in one allocation: many of 10 to 40 MB, each rounded up, would waste hundreds of
    MB.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[int, Array]] = []
        self._memory: torch.Tensor | None = None
        self.num_bytes = 0

    def array(self, array: Array, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
        """Reserves a place; what it returns gives the tensor once ``fill`` has run. dtype: of the tensor."""
        offset = self.num_bytes
        self._arrays.append((offset, array))
        self.num_bytes = -(-(offset + array.nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        kind = dtype or _TORCH_OF[array.dtype]

        def tensor() -> torch.Tensor:
            return self.memory[offset : offset + array.nbytes].view(kind).view(array.shape)

        return tensor

    @property
    def memory(self) -> torch.Tensor:
        """The allocation."""
        if self._memory is None:
            raise RuntimeError("the block is not filled yet")
        return self._memory

    def fill(self, device: Device, stream: Stream) -> None:
        """Allocates and copies everything."""
        self._memory = device.empty((self.num_bytes,), torch.uint8)
        uploader = Uploader(device, stream)
        for offset, array in self._arrays:
            uploader.put(array, self._memory[offset : offset + array.nbytes])
        uploader.finish()
