"""In how many bits a GPU keeps keys and values, and what computing with them takes."""

from __future__ import annotations

from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import Windows, fixed_bytes

SCRATCH_BYTES = 64 * 2**20
"""Floats of 8-bit keys and values while a pass attends: all heads of a layer at once, if they have room in
this; at least one head of a whole context."""
_FLOAT_BYTES = 2


def gpu_kv_dtype(spec: ModelSpec, asked: str, gpu_dtype: str) -> str:
    """What a GPU keeps of a sequence: ``int8`` if that is asked for, else gpu_dtype. Latents stay 16-bit:
    there is one for all heads, so that a model with such keeps little."""
    has_latents = any(isinstance(layer.mixer, LatentAttention) for layer in spec.layers)
    return "int8" if asked == "int8" and not has_latents else gpu_dtype


def planned_kv_dtype(spec: ModelSpec, asked: str) -> str:
    """What a plan for GPUs counts: what is asked for, but of latents, which stay 16-bit."""
    return gpu_kv_dtype(spec, asked, "bf16") if asked == "int8" else asked


def gpu_windows(spec: ModelSpec, num_gpus: int) -> Windows:
    """What GPUs keep of layers with a window: of several each has the whole cache, into which the others'
    rows come; beside states, which are copied inside of passes, windows are whole, too."""
    return "rings" if num_gpus == 1 and not fixed_bytes(spec) else "whole"


def kv_scratch_bytes(spec: ModelSpec, capacity: int) -> int:
    """Scratch for contexts of so many positions whose keys and values are kept in 8 bits."""
    most = 0
    for layer in dict.fromkeys(spec.layers):
        if isinstance(layer.mixer, Attention):
            head_bytes = 2 * capacity * layer.mixer.head_dim * _FLOAT_BYTES
            most = max(most, min(layer.mixer.kv_heads * head_bytes, max(head_bytes, SCRATCH_BYTES)))
    return most
