"""What a sequence keeps of its past: the one statement that planner, caches and saved prefixes ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.spec import Layer, Mixer, ModelSpec

_F32_BYTES = 4
SNAPSHOTS = 4
"""Copies of what each token overwrites that a sequence may keep, to go back to their positions."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that grow with the sequence: ``entry_bytes`` for every ``every`` tokens; with a window only
    those of the last ``window`` tokens.
    """

    entry_bytes: int
    every: int = 1
    window: int | None = None

    def bytes_for(self, positions: int) -> int:
        """Bytes after that many tokens."""
        tokens = positions if self.window is None else min(positions, self.window)
        return tokens // self.every * self.entry_bytes


@dataclass(frozen=True, slots=True)
class State:
    """What one mixer keeps of one sequence: growing entries, and fixed_bytes that each token overwrites."""

    kept: tuple[Kept, ...] = ()
    fixed_bytes: int = 0

    @property
    def token_bytes(self) -> float:
        """Bytes that each token adds for good."""
        return sum(kept.entry_bytes / kept.every for kept in self.kept if kept.window is None)

    @property
    def window(self) -> int | None:
        """The largest window beyond which entries are dropped; None where all stay."""
        windows = [kept.window for kept in self.kept if kept.window is not None]
        return max(windows, default=None)

    @property
    def cuts_anywhere(self) -> bool:
        """Whether the state after any earlier token can be had from it by dropping entries."""
        return self.fixed_bytes == 0 and self.window is None

    def bytes_for(self, positions: int) -> int:
        """Bytes after that many tokens."""
        return self.fixed_bytes + sum(kept.bytes_for(positions) for kept in self.kept)


def state(mixer: Mixer | None, item_bytes: int = 2) -> State:
    """What a mixer keeps. item_bytes: of one number of a key or value (2: bfloat16 or float16)."""
    return State() if mixer is None else _STATES[type(mixer)](mixer, item_bytes)


def layer_state(spec: ModelSpec, layer: Layer, item_bytes: int = 2) -> State:
    """What a layer keeps: its mixer's state and, for an n-gram table, the columns of its convolution."""
    own = state(layer.mixer, item_bytes)
    if not layer.ngram or spec.ngram is None:
        return own
    wide = (spec.residual.streams if spec.residual is not None else 1) * spec.hidden
    columns = (spec.ngram.conv_width - 1) * spec.ngram.dilation
    return State(own.kept, own.fixed_bytes + columns * wide * item_bytes + 8 * (spec.ngram.longest - 1))


def sequence_bytes(spec: ModelSpec, positions: int, item_bytes: int = 2) -> int:
    """Bytes that a sequence of that many tokens keeps in all layers."""
    return sum(layer_state(spec, layer, item_bytes).bytes_for(positions) for layer in spec.layers)


def fixed_bytes(spec: ModelSpec) -> int:
    """Bytes of a sequence that each token overwrites, in all layers; a snapshot is as large."""
    return sum(layer_state(spec, layer).fixed_bytes for layer in spec.layers)


def _attention(mixer: Attention, item_bytes: int) -> State:
    per_token = mixer.kv_heads * (mixer.head_dim + mixer.value_width) * item_bytes
    kept = [Kept(per_token, window=mixer.window or mixer.chunk)]
    if mixer.selection is not None and not mixer.selection.reuses:
        kept.append(Kept(mixer.selection.key_heads * mixer.selection.dim * item_bytes))
    return State(tuple(kept))


def _latent(mixer: LatentAttention, item_bytes: int) -> State:
    kept = [Kept((mixer.kv_rank + mixer.rope_dim) * item_bytes)]
    if mixer.selection is not None and not mixer.selection.reuses:
        keys = 2 if mixer.selection.kind == "pools" else 1  # a pool needs each token's gate too
        kept.append(Kept(keys * mixer.selection.dim * item_bytes))
    return State(tuple(kept))


def _compressed(mixer: CompressedAttention, item_bytes: int) -> State:
    window = Kept(mixer.head_dim * item_bytes, window=mixer.window)
    if mixer.ratio is None:
        return State((window,))
    kept = [window, Kept(mixer.head_dim * item_bytes, every=mixer.ratio)]
    width = mixer.head_dim
    if mixer.selection is not None:
        kept.append(Kept(mixer.selection.dim * item_bytes, every=mixer.ratio))
        width += mixer.selection.dim
    # Tokens of the window that is still open, and of the one before where they overlap, with their gates.
    slots = (2 if mixer.overlap else 1) * mixer.ratio
    return State(tuple(kept), 2 * slots * width * item_bytes * (2 if mixer.overlap else 1))


def _gated_delta(mixer: GatedDelta, item_bytes: int) -> State:
    numbers = mixer.value_heads * mixer.key_dim * mixer.value_dim
    return State(fixed_bytes=(numbers + mixer.conv_channels * (mixer.conv_width - 1)) * _F32_BYTES)


def _channel_delta(mixer: ChannelDelta, item_bytes: int) -> State:
    matrix = mixer.heads * mixer.dim * mixer.dim * _F32_BYTES
    return State(fixed_bytes=matrix + 3 * mixer.heads * mixer.dim * (mixer.conv_width - 1) * item_bytes)


def _mamba2(mixer: Mamba2, item_bytes: int) -> State:
    matrix = mixer.inner * mixer.state_dim * _F32_BYTES
    return State(fixed_bytes=matrix + mixer.conv_channels * (mixer.conv_width - 1) * item_bytes)


def _short_conv(mixer: ShortConv, item_bytes: int) -> State:
    return State(fixed_bytes=mixer.channels * (mixer.width - 1) * item_bytes)


_STATES: dict[type, Callable[[Any, int], State]] = {
    Attention: _attention,
    LatentAttention: _latent,
    CompressedAttention: _compressed,
    GatedDelta: _gated_delta,
    ChannelDelta: _channel_delta,
    Mamba2: _mamba2,
    ShortConv: _short_conv,
}
