"""Scratch memory of the kernels: how much they need, and where it comes from."""

from __future__ import annotations

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.heads import Heads
from krasis.runtime.cpu.native import prototype
from krasis.runtime.cpu.native_arrays import U8, Array, aligned_empty


def attention_workspace_bytes(num_rows: int, longest_end: int, heads: Heads) -> int:
    """Enough for ``Kernels.attention`` with up to num_rows rows, and spans that end by longest_end."""
    name = "krasis_attention_workspace_bytes"
    return _size(prototype(name)(num_rows, longest_end, heads.num_heads, heads.head_dim), name)


def moe_workspace_bytes(tokens: int, hidden: int, intermediate: int, num_experts: int, top_k: int) -> int:
    """Workspace of ``Kernels.moe``."""
    function = prototype("krasis_moe_workspace_bytes")
    return _size(function(tokens, hidden, intermediate, num_experts, top_k), "krasis_moe_workspace_bytes")


def workspace(num_bytes: int) -> Array:
    """An uninitialised 64-byte aligned uint8 [num_bytes]."""
    return aligned_empty((num_bytes,), U8)


def _size(num_bytes: int, function: str) -> int:
    if num_bytes < 0:
        raise NativeError("sizes are out of their domain", where=function)
    return num_bytes
