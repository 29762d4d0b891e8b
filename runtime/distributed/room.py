"""The memory through which keys and values go to other ranks: a pass's own where it holds them, so that an
exchange allocates nothing. What a rank has no memory for in the middle of one, it could not take back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch


def room_for(shape: Sequence[int], like: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
    """A tensor of that shape and of like's dtype at the beginning of the scratch memory, or a new one where
    there is none, or not enough."""
    num_bytes = prod(shape) * like.element_size()
    if scratch is None or num_bytes > scratch.numel() * scratch.element_size():
        return like.new_empty(shape)
    return scratch.flatten().view(torch.uint8)[:num_bytes].view(like.dtype).view(*shape)


def side_by_side(tensors: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """The shape of all [kv_heads, n, head_dim] together."""
    kv_heads, _, head_dim = tensors[0].shape
    return kv_heads, sum(tensor.shape[1] for tensor in tensors), head_dim


def steps_within(tensors: Sequence[torch.Tensor], scratch: torch.Tensor | None) -> list[list[torch.Tensor]]:
    """Tensors [kv_heads, n, head_dim], alike but for n, cut so that each step's fit in the scratch memory
    together; all in one without any, or if it does not hold a single position."""
    first = tensors[0]
    row_bytes = first.shape[0] * first.shape[2] * first.element_size()
    most = 0 if scratch is None else scratch.numel() * scratch.element_size() // row_bytes
    if most == 0:
        return [list(tensors)]
    steps: list[list[torch.Tensor]] = [[]]
    free = most
    for tensor in tensors:
        begin = 0
        while begin < tensor.shape[1]:
            if free == 0:
                steps.append([])
                free = most
            end = min(tensor.shape[1], begin + free)
            steps[-1].append(tensor[:, begin:end])
            begin, free = end, free - (end - begin)
    return steps
