"""Rows on their way into latent attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LatentRows:
    """q [T, >= heads * head_dim], 16-bit; kv float32 [T, >= kv_rank + rope_dim]. Of layers with an index of
    their own: k float32 [T, dim], of its keys, and latents float32 [T, q_rank], of queries, before their
    norm. first: the number of the first among a rank's own rows."""

    q: torch.Tensor
    kv: torch.Tensor
    k: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    first: int = 0

    def part(self, first: int, last: int) -> LatentRows:
        """Rows [first, last)."""
        own = slice(first, last)
        k, latents = (None if one is None else one[own] for one in (self.k, self.latents))
        return LatentRows(self.q[own], self.kv[own], k, latents, self.first + first)
