"""Multiply-adds of a layer's mixer beside its projections: scores and values of attention, by what each query
sees; the work on a state of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Mixer
from krasis.runtime.planning import latent_workspace

_STATE_PASSES = 3
"""A state's matrix is decayed and read, gets the token's product added, and is read again (assumed)."""


def mixer_macs(mixer: Mixer | None, start: int, num_tokens: int) -> int:
    """Multiply-adds of ``num_tokens`` tokens from position ``start`` on, in one layer."""
    return 0 if mixer is None else _MACS[type(mixer)](mixer, start, num_tokens)


def gpu_mixer_macs(mixer: Mixer | None, start: int, num_tokens: int) -> int:
    """As ``mixer_macs``, in a pass on a GPU: there latent attention of many tokens runs over keys and values
    that are made of the latents, the values as wide as the keys or wider; not of those for which an index
    chooses."""
    dense = _dense_tokens(mixer, start, num_tokens)
    if not _expands(mixer, dense):
        return mixer_macs(mixer, start, num_tokens)
    head_dim = mixer.nope_dim + mixer.rope_dim
    expanded = mixer.heads * (head_dim + max(head_dim, mixer.value_dim)) * _pairs(start, dense)
    return expanded + mixer_macs(mixer, start + dense, num_tokens - dense)


def expansion_macs(mixer: Mixer | None, start: int, num_tokens: int, num_ranks: int) -> int:
    """Multiply-adds that make keys and values of latents on GPUs, each rank for itself, beyond those of a
    token's own: the weights' count has them."""
    dense = _dense_tokens(mixer, start, num_tokens)
    if not _expands(mixer, dense):
        return 0
    latents = num_ranks * (start + dense) - dense
    return latents * mixer.heads * mixer.kv_rank * (mixer.nope_dim + mixer.value_dim)


def _dense_tokens(mixer: Mixer | None, start: int, num_tokens: int) -> int:
    """Of so many tokens those that see no more than an index over tokens picks."""
    index = mixer.selection if isinstance(mixer, LatentAttention) else None
    return num_tokens if index is None else min(num_tokens, max(0, index.budget - start))


def _expands(mixer: Mixer | None, num_tokens: int) -> TypeGuard[LatentAttention]:
    return isinstance(mixer, LatentAttention) and num_tokens >= latent_workspace.LEAST_EXPANDED


def _pairs(start: int, num_tokens: int, most: int | None = None, chunk: int | None = None) -> int:
    """Pairs of a query and a key that it sees, of causal attention: at most the last ``most``, or those of
    its own chunk.
    """
    before, after = (_pairs_from_start(count, most, chunk) for count in (start, start + num_tokens))
    return after - before


def _pairs_from_start(count: int, most: int | None, chunk: int | None) -> int:
    if chunk is not None:
        full, rest = divmod(count, chunk)
        return full * _triangle(chunk) + _triangle(rest)
    if most is not None and count > most:
        return _triangle(most) + (count - most) * most
    return _triangle(count)


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


def _attention(mixer: Attention, start: int, num_tokens: int) -> int:
    most = _least(mixer.window, mixer.selection.budget if mixer.selection is not None else None)
    pair = mixer.heads * (mixer.head_dim + mixer.value_width)
    return pair * _pairs(start, num_tokens, most, mixer.chunk) + _index(mixer.selection, start, num_tokens)


def _latent(mixer: LatentAttention, start: int, num_tokens: int) -> int:
    most = mixer.selection.budget if mixer.selection is not None else None
    pair = mixer.heads * (2 * mixer.kv_rank + mixer.rope_dim)  # of the latents, which are keys and values
    return pair * _pairs(start, num_tokens, most) + _index(mixer.selection, start, num_tokens)


def _compressed(mixer: CompressedAttention, start: int, num_tokens: int) -> int:
    pair = 2 * mixer.heads * mixer.head_dim
    macs = pair * _pairs(start, num_tokens, mixer.window)
    if mixer.ratio is None:
        return macs
    most = mixer.selection.budget * mixer.ratio if mixer.selection is not None else None
    entries = _pairs(start, num_tokens, most) // mixer.ratio
    return macs + pair * entries + _index(mixer.selection, start, num_tokens) // mixer.ratio


def _index(selection: Selection | None, start: int, num_tokens: int) -> int:
    """Scores of all keys, or of a block's one key."""
    if selection is None or selection.reuses:
        return 0
    scored = 1 if selection.kind in ("tokens", "block_max") else selection.block
    return selection.heads * selection.dim * _pairs(start, num_tokens) // scored


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _gated_delta(mixer: GatedDelta, start: int, num_tokens: int) -> int:
    return num_tokens * _STATE_PASSES * mixer.value_heads * mixer.key_dim * mixer.value_dim


def _channel_delta(mixer: ChannelDelta, start: int, num_tokens: int) -> int:
    return num_tokens * _STATE_PASSES * mixer.heads * mixer.dim * mixer.dim


def _mamba2(mixer: Mamba2, start: int, num_tokens: int) -> int:
    return num_tokens * _STATE_PASSES * mixer.inner * mixer.state_dim


def _short_conv(mixer: ShortConv, start: int, num_tokens: int) -> int:
    return 0  # its convolution is among the weights


_MACS: dict[type, Callable[[Any, int, int], int]] = {
    Attention: _attention,
    LatentAttention: _latent,
    CompressedAttention: _compressed,
    GatedDelta: _gated_delta,
    ChannelDelta: _channel_delta,
    Mamba2: _mamba2,
    ShortConv: _short_conv,
}
