"""The host's memory for keys and values of layers that have no room in VRAM."""

from __future__ import annotations

import torch

from krasis.formats.errors import ResourceError
from krasis.formats.models.spec import ModelSpec
from krasis.formats.units import format_bytes
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.cache_parts import cache_layout
from krasis.runtime.gpu.plan import GpuPlan
from krasis.runtime.host.environment import probe_memory
from krasis.runtime.planning.host import host_reserve_bytes
from krasis.runtime.planning.host_kv import host_layers


def host_kv_memory(device: Device, spec: ModelSpec, plan: GpuPlan) -> torch.Tensor | None:
    """Pinned, [num_slots, bytes of a slot], as planned; None if no layer needs it. To be had before experts
    are pinned, which take what is left. Raises ResourceError where RAM is short."""
    work = plan.workload
    layers = host_layers(spec, work.host_kv_layers)
    layout = cache_layout(spec, work.context, eight_bits=work.kv_dtype == "int8", host_layers=layers)
    if not layout.host_bytes:
        return None
    memory, needed = probe_memory(), work.slots * layout.host_bytes
    free = memory.available_bytes - host_reserve_bytes(memory.limit_bytes)
    if needed > free:
        raise ResourceError(
            "no RAM for the keys and values that VRAM has no room for",
            got=f"{format_bytes(needed)} of {len(layers)} layers",
            limit=f"{format_bytes(max(0, free))} are free",
            hint="a shorter context (krasis-run --ctx), or 8 bits (--kv-dtype int8)",
        )
    return device.pinned((work.slots, layout.host_bytes), torch.uint8)
