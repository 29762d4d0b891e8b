"""A bundle's dense weights on the device, in one block of memory; the embedding stays mapped on the host.

``runtime/cpu/weights.py`` has checked every shape and dtype before a byte gets here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import FormatError, NativeError
from krasis.formats.layouts import ExpertFormat, ExpertRecord
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import TABLE
from krasis.runtime.cpu.rope import rope_tables
from krasis.runtime.cpu.weights import FloatWeight, Int8Weight, ModelWeights
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.upload import TORCH_DTYPES, Uploader
from krasis.runtime.planning.shape import shape_of

Array = npt.NDArray[Any]
ALIGNMENT_BYTES = 256
_END = "final_residual."
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
    """One layer's dense weights on the device, by the names that ``layer_tensors`` gives them: INT8 rows,
    f32 vectors, and matrices [n, k] in their own precision.
    """

    tensors: Mapping[str, GpuInt8 | torch.Tensor]

    def int8(self, name: str) -> GpuInt8:
        """A matrix in INT8 rows."""
        found = self.tensors.get(name)
        if not isinstance(found, GpuInt8):
            raise NativeError("the layer has no such weight", where=name, limit="INT8 rows")
        return found

    def plain(self, name: str) -> torch.Tensor:
        """A vector, or a matrix in its own precision."""
        found = self.tensors.get(name)
        if not isinstance(found, torch.Tensor):
            raise NativeError("the layer has no such weight", where=name, limit="plain numbers")
        return found

    def optional(self, name: str) -> torch.Tensor | None:
        """As ``plain``; None if the layer has no such weight."""
        return self.plain(name) if name in self.tensors else None


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """A model's dense weights. ropes: (cos, sin) f32 [positions, rotated channels / 2] by rotation.
    embedding: on the host, as tables of n-grams are. end: what stands in place of final_norm, which is empty
    then.

    expert_layout and record: the form of the experts that are streamed.
    """

    embedding: FloatWeight
    layers: tuple[GpuLayer, ...]
    final_norm: torch.Tensor
    lm_head: GpuInt8
    ropes: Mapping[Rope, tuple[torch.Tensor, torch.Tensor]]
    expert_layout: ExpertFormat
    record: ExpertRecord
    num_bytes: int
    end: GpuLayer

    def rope(self, rope: Rope | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of a rotation that the model has."""
        if rope is None:
            raise NativeError("attention without rotation has no tables", where="weights")
        return self.ropes[rope]


def load_gpu_weights(weights: ModelWeights, device: Device, stream: Stream, num_positions: int) -> GpuWeights:
    """Copies the dense weights; returns when they have arrived.

    weights: with the experts of the gpu tier. num_positions: of the rotary tables. Raises
    OutOfDeviceMemoryError, and FormatError if the experts are of another tier.
    """
    layout, spec = weights.expert_layout, weights.spec
    if layout.tier != "gpu":
        raise FormatError("the GPU streams Marlin experts only", got=layout.layout_id)
    block = _Block()
    layers = [
        {name: _weight(block, weight) for name, weight in layer.tensors.items() if name != TABLE}
        for layer in weights.layers
    ]
    gates = {name: _weight(block, one) for name, one in weights.end.items() if name.startswith(_END)}
    lm_head = _weight(block, weights.lm_head)
    final_norm = block.array(weights.final_norm)
    ropes = {
        rope: tuple(block.array(table) for table in rope_tables(rope, num_positions, head_dim=head_dim))
        for rope, head_dim in _ropes(spec).items()
    }
    block.fill(device, stream)
    shape = shape_of(spec)
    head = lm_head()
    if not isinstance(head, GpuInt8):
        raise FormatError("the output head is not of INT8 rows")
    return GpuWeights(
        embedding=weights.embedding,
        layers=tuple(GpuLayer({name: make() for name, make in layer.items()}) for layer in layers),
        final_norm=final_norm(),
        lm_head=head,
        ropes={rope: (cos(), sin()) for rope, (cos, sin) in ropes.items()},
        expert_layout=layout,
        record=layout.expert_record(shape.expert_width, shape.expert_intermediate_size, shape.gated_experts),
        num_bytes=block.num_bytes,
        end=GpuLayer({name: make() for name, make in gates.items()}),
    )


def _ropes(spec: ModelSpec) -> dict[Rope, int]:
    """Each rotation with the channels of a head that it may turn."""
    mixers = [layer.mixer for layer in spec.layers]
    found = {mixer.rope: mixer.head_dim for mixer in mixers if isinstance(mixer, Attention)}
    latent = [mixer for mixer in mixers if isinstance(mixer, LatentAttention)]
    found |= {mixer.rope: mixer.rope_dim for mixer in latent}
    indices = (mixer.selection for mixer in latent if mixer.index_dim)
    found = {index.rope: index.dim for index in indices if index is not None} | found
    return {rope: channels for rope, channels in found.items() if rope is not None}


def _weight(block: _Block, weight: object) -> Callable[[], GpuInt8 | torch.Tensor]:
    if isinstance(weight, Int8Weight):
        codes, scales = block.array(weight.codes), block.array(weight.scales)
        return lambda: GpuInt8(codes(), scales())
    if isinstance(weight, FloatWeight):
        return block.array(weight.data, TORCH_DTYPES[weight.dtype])
    if isinstance(weight, np.ndarray):
        return block.array(weight)
    raise FormatError("a weight of an unknown kind", got=type(weight).__name__)


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
        with Uploader(device, stream) as uploader:
            for offset, array in self._arrays:
                uploader.put(array, self._memory[offset : offset + array.nbytes])
            uploader.finish()
