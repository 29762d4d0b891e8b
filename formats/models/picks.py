"""Where a source keeps the rows of a tensor, if they do not lie there as a model has them: inside a tensor of
several projections, by heads, or in another order of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import Attention
from krasis.formats.models.recurrent import GatedDelta, Mamba2

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """places: for each row (axis 0) or column (axis 1) of the model's tensor, that of the source's tensor,
    which has ``of`` of them.
    """

    places: Places
    of: int
    axis: Literal[0, 1] = 0


PickOf = Callable[[Any], Pick]
"""The pick for a layer's mixer."""


def rows_of_groups(groups: int, sizes: tuple[int, ...], number: int) -> Pick:
    """Of ``groups`` groups, each of parts of so many rows, the part of that number, group after group."""
    step, first = sum(sizes), sum(sizes[:number])
    places = np.arange(groups)[:, None] * step + first + np.arange(sizes[number])
    return Pick(places.reshape(-1), groups * step)


def gated_query(mixer: Attention) -> Pick:
    """Queries of a projection that has each head's query and then its gate."""
    return rows_of_groups(mixer.heads, (mixer.head_dim, mixer.value_width), 0)


def query_gate(mixer: Attention) -> Pick:
    """The gates of the same."""
    return rows_of_groups(mixer.heads, (mixer.head_dim, mixer.value_width), 1)


def by_key_head(part: str) -> PickOf:
    """A part (q, k, v, z; b, a) of a projection that has all parts of one key head, then those of the
    next."""

    def pick(mixer: GatedDelta) -> Pick:
        share = mixer.value_heads // mixer.key_heads
        if part in ("b", "a"):
            return rows_of_groups(mixer.key_heads, (share, share), "ba".index(part))
        value = share * mixer.value_dim
        return rows_of_groups(
            mixer.key_heads, (mixer.key_dim, mixer.key_dim, value, value), "qkvz".index(part)
        )

    return pick


def side_by_side(part: str, *, tiled: bool = False) -> PickOf:
    """A part (q, k, v) of a projection that has all of q, all of k, all of v. tiled: see ``tiled_heads``."""

    def pick(mixer: GatedDelta) -> Pick:
        key, value = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
        found = rows_of_groups(1, (key, key, value), "qkv".index(part))
        if not (tiled and part == "v"):
            return found
        return Pick(2 * key + _tiled(mixer, mixer.value_dim), found.of)

    return pick


def mamba_input(mixer: Mamba2) -> Pick:
    """Rows of z, x, B and C of a projection that has those of the time steps after them."""
    rows = mixer.inner + mixer.conv_channels
    return Pick(np.arange(rows), rows + mixer.heads)


def mamba_steps(mixer: Mamba2) -> Pick:
    """Rows of the time steps of the same."""
    rows = mixer.inner + mixer.conv_channels
    return Pick(rows + np.arange(mixer.heads), rows + mixer.heads)


def tiled_heads(width: Callable[[GatedDelta], int], axis: Literal[0, 1] = 0) -> PickOf:
    """Value heads that the source has tiled: the first of each key head, then the second of each, and so on.
    width: rows (or columns) of one head.
    """

    def pick(mixer: GatedDelta) -> Pick:
        places = _tiled(mixer, width(mixer))
        return Pick(places, len(places), axis)

    return pick


def tiled_channels(mixer: GatedDelta) -> Pick:
    """Channels of the convolution: q and k in order, those of v tiled."""
    keys = 2 * mixer.key_heads * mixer.key_dim
    places = np.concatenate([np.arange(keys), keys + _tiled(mixer, mixer.value_dim)])
    return Pick(places, len(places))


def _tiled(mixer: GatedDelta, width: int) -> Places:
    share = mixer.value_heads // mixer.key_heads
    heads = np.arange(mixer.value_heads)
    there = heads % share * mixer.key_heads + heads // share
    return (there[:, None] * width + np.arange(width)).reshape(-1)
