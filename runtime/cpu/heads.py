"""What the attention kernels need to know of a layer besides its sizes in rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krasis.runtime.cpu.native_arrays import Array


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a layer: query heads, key/value heads (a divisor), elements of a head.
    latent_values: values are so many elements at the beginning of the keys, and nothing besides is kept.
    shared_kv: the projection has no values: they are its keys."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent_values: int | None = None
    shared_kv: bool = False

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: queries, keys, values."""
        return (self.num_heads + (1 if self.shared_kv else 2) * self.num_kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Columns of the queries."""
        return self.num_heads * self.head_dim

    @property
    def output_size(self) -> int:
        """Columns of the attention's output."""
        return self.num_heads * (self.latent_values or self.head_dim)


@dataclass(frozen=True, slots=True)
class QkNorms:
    """RMS norms of q and k: float32 weights [head_dim] of each head (``head``, ``head_after_rope``), or of
    the whole projection (``flat``): [num_heads * head_dim] and [num_kv_heads * head_dim].
    """

    q: Array
    k: Array
    eps: float
    kind: Literal["head", "flat", "head_after_rope"] = "head"


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables of a rotary embedding, float32 [positions, rotary_dims/2]; style as ``formats.models.rope``."""

    cos: Array
    sin: Array
    style: Literal["half", "interleaved"] = "half"
