"""Keys and values for which VRAM has no room: of whole layers, in the host's memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.state import Windows, layer_state
from krasis.runtime.planning.hardware import GpuSpec
from krasis.runtime.planning.kv_form import gpu_windows, planned_kv_dtype
from krasis.runtime.planning.sizes import KV_DTYPE_BYTES, LayerSizes, ModelSizes
from krasis.runtime.planning.types import Workload

STAGING_BUFFERS = 2
"""In VRAM, each of one layer's keys and values, while a pass attends (``gpu/kv_staging.py``)."""
_STEPS = 16


def movable_layers(spec: ModelSpec) -> list[int]:
    """The layers with keys and values of all positions, in the order in which they leave VRAM, evenly spread.
    (What a layer with a window keeps is small, however long the context is.)"""
    return _spread([index for index, layer in enumerate(spec.layers) if _is_movable(layer)])


def host_layers(spec: ModelSpec, count: int) -> tuple[int, ...]:
    """The numbers of so many layers whose keys and values lie in the host's memory, ascending."""
    return tuple(sorted(movable_layers(spec)[:count]))


def counts_to_try(spec: ModelSpec) -> list[int]:
    """Numbers of layers that a plan considers when not all have room in VRAM, ascending."""
    total = len(movable_layers(spec))
    return sorted({-(-total * step // _STEPS) for step in range(1, _STEPS + 1)} - {0})


@dataclass(frozen=True, slots=True)
class KvSplit:
    """Keys and values of all sequences, and the states of layers that have such. device_bytes: in VRAM, with
    what computing with them takes. host_bytes: in pinned memory of the host."""

    device_bytes: int
    host_bytes: int


def kv_split(sizes: ModelSizes, workload: Workload, num_gpus: int = 1) -> KvSplit:
    """Where the sequences of each of so many GPUs lie."""
    kv_dtype = planned_kv_dtype(sizes.spec, workload.kv_dtype)
    moved = [
        _layer_bytes(sizes.spec, sizes.spec.layers[index], workload.context, kv_dtype, "whole")
        for index in host_layers(sizes.spec, workload.host_kv_layers)
    ]
    sequence = sizes.sequence_bytes(workload.context, kv_dtype, gpu_windows(sizes.spec, num_gpus))
    device_bytes = sizes.gpu_kv_bytes(workload.context, kv_dtype, num_gpus) + (workload.slots - 1) * sequence
    device_bytes += STAGING_BUFFERS * max(moved, default=0) - workload.slots * sum(moved)
    return KvSplit(device_bytes, workload.slots * sum(moved))


def read_bytes(sizes: ModelSizes, workload: Workload, positions: int) -> int:
    """What a token after so many reads of the host's memory."""
    spec, kv_dtype = sizes.spec, planned_kv_dtype(sizes.spec, workload.kv_dtype)
    layers = (spec.layers[index] for index in host_layers(spec, workload.host_kv_layers))
    return sum(_layer_bytes(spec, layer, positions, kv_dtype, "seen") for layer in layers)


def staging_s(
    sizes: ModelSizes, workload: Workload, kind: LayerSizes, spec: GpuSpec, start: int, tokens: int
) -> float:
    """Copies of one layer of a kind, on average, for a pass of tokens that begins at start: over a link that
    carries both ways at once."""
    if not workload.host_kv_layers:
        return 0.0
    model, kv_dtype = sizes.spec, planned_kv_dtype(sizes.spec, workload.kv_dtype)
    moved = Counter(model.layers[index] for index in host_layers(model, workload.host_kv_layers))
    share = moved[kind.layer] / model.layers.count(kind.layer)
    held = [_layer_bytes(model, kind.layer, n, kv_dtype, "whole") for n in (start, tokens)]
    return share * max(held) / (spec.link_gbps.value * 1e9)


def with_host_layers(workload: Workload, count: int) -> Workload:
    """The same, with so many layers' keys and values in the host's memory."""
    return replace(workload, host_kv_layers=count)


def _layer_bytes(spec: ModelSpec, layer: Layer, positions: int, kv_dtype: str, windows: Windows) -> int:
    return layer_state(spec, layer, KV_DTYPE_BYTES[kv_dtype]).bytes_for(positions, windows)


def _is_movable(layer: Layer) -> bool:
    mixer = layer.mixer
    return isinstance(mixer, LatentAttention) or (isinstance(mixer, Attention) and mixer.window is None)


def _spread(layers: list[int]) -> list[int]:
    """In an order of which any beginning is spread evenly: by the digits of their places, turned round. From
    the last one on: the first has no layer before it whose experts it could be read beside."""
    bits = max(1, (len(layers) - 1).bit_length()) if layers else 0
    return [layers[-1 - i] for i in sorted(range(len(layers)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]
