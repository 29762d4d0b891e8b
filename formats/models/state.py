"""What a sequence keeps of its past: the one statement that planner, caches and saved prefixes ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.spec import Layer, Mixer, ModelSpec

_F32_BYTES = 4
SNAPSHOTS = 4
"""Copies of what each token overwrites that a sequence may keep, to go back to their positions."""
TAIL_TOKENS = 16
"""The end of a prompt that the next turn may write in another way: the header of an answer, an empty
thought. A sequence can go back to before it: a copy of a window reaches so much further."""
RING_STEP, _RING_SPARE = 64, 64

Windows = Literal["seen", "rings", "whole"]
"""What is counted of layers with a window: the positions that a token sees, those that have room in a ring
(CPU), or all of the context (GPU, for now)."""


def ring_positions(window: int) -> int:
    """Positions that a layer with a window has room for: those that a token sees, and as many more as are
    computed at once or taken back, in whole blocks of keys.
    """
    return align_up(window + _RING_SPARE, RING_STEP)


def ring_rows(window: int) -> int:
    """The most tokens of a sequence that such a layer computes at once: the first still sees its window."""
    return ring_positions(window) - window + 1


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that grow with the sequence: ``entry_bytes`` for every ``every`` tokens; with a window only
    those of the last ``window`` tokens.
    """

    entry_bytes: int
    every: int = 1
    window: int | None = None

    def bytes_for(self, positions: int, windows: Windows = "seen") -> int:
        """Bytes after that many tokens; of a window, what of it is counted."""
        tokens = positions
        if self.window is not None and windows != "whole":
            tokens = min(positions, ring_positions(self.window) if windows == "rings" else self.window)
        return tokens // self.every * self.entry_bytes

    def copy_bytes(self, positions: int) -> int:
        """Of a copy that can be gone back to: what a window overwrites in a context of so many positions."""
        if self.window is None or positions <= ring_positions(self.window):
            return 0
        return (self.window + TAIL_TOKENS) * self.entry_bytes


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

    def bytes_for(self, positions: int, windows: Windows = "seen") -> int:
        """Bytes after that many tokens."""
        return self.fixed_bytes + sum(kept.bytes_for(positions, windows) for kept in self.kept)

    def copy_bytes(self, positions: int) -> int:
        """Of a copy of what tokens overwrite in a context of so many positions."""
        return self.fixed_bytes + sum(kept.copy_bytes(positions) for kept in self.kept)


def state(mixer: Mixer | None, item_bytes: int = 2) -> State:
    """What a mixer keeps. item_bytes: of one number of a key or value (2: bfloat16 or float16; 1:
    int8 with scales)."""
    return State() if mixer is None else _STATES[type(mixer)](mixer, item_bytes)


def layer_state(spec: ModelSpec, layer: Layer, item_bytes: int = 2) -> State:
    """What a layer keeps: its mixer's state and, for an n-gram table, what its convolution and its hashes
    reach back to."""
    own = state(layer.mixer, item_bytes)
    if not layer.ngram or spec.ngram is None:
        return own
    return State(own.kept, own.fixed_bytes + table_numbers(spec) * _F32_BYTES)


def table_numbers(spec: ModelSpec) -> int:
    """Numbers of 4 bytes that a layer with an n-gram table keeps: earlier inputs of the convolution, then the
    last token ids."""
    table = spec.ngram
    return 0 if table is None else table.past_rows * spec.residual_width + table.longest - 1


def sequence_bytes(spec: ModelSpec, positions: int, item_bytes: int = 2, windows: Windows = "seen") -> int:
    """Bytes that a sequence of that many tokens keeps in all layers."""
    return sum(layer_state(spec, layer, item_bytes).bytes_for(positions, windows) for layer in spec.layers)


def copy_bytes(spec: ModelSpec, positions: int, item_bytes: int = 2) -> int:
    """Bytes of a copy of all that the tokens of a sequence overwrite in a context of so many positions."""
    return sum(layer_state(spec, layer, item_bytes).copy_bytes(positions) for layer in spec.layers)


def fixed_bytes(spec: ModelSpec) -> int:
    """Bytes of a sequence that each token overwrites, in all layers."""
    return sum(layer_state(spec, layer).fixed_bytes for layer in spec.layers)


def _row_bytes(item_bytes: int, *parts: int) -> int:
    """Of channels; in 8 bits each part has a scale in float32."""
    return sum(parts) * item_bytes + (len(parts) * _F32_BYTES if item_bytes == 1 else 0)


def _attention(mixer: Attention, item_bytes: int) -> State:
    per_token = mixer.kv_heads * _row_bytes(item_bytes, mixer.head_dim, mixer.value_width)
    kept = [Kept(per_token, window=mixer.window or mixer.chunk)]
    if mixer.selection is not None and not mixer.selection.reuses:
        kept.append(Kept(mixer.selection.key_heads * mixer.selection.dim * item_bytes))
    return State(tuple(kept))


def _latent(mixer: LatentAttention, item_bytes: int) -> State:
    kept = [Kept(_row_bytes(item_bytes, mixer.kv_rank, mixer.rope_dim))]
    if mixer.selection is not None and not mixer.selection.reuses:
        kept.append(Kept(_row_bytes(item_bytes, *mixer.selection.key_parts)))
    return State(tuple(kept))


def _compressed(mixer: CompressedAttention, item_bytes: int) -> State:
    # Keys of all tokens, for now, and of all what entries are made of: these take the place of one of theirs.
    kept = [Kept(_row_bytes(item_bytes, mixer.head_dim))]
    if mixer.ratio is not None:
        kept.append(Kept(_row_bytes(item_bytes, *mixer.kept_parts)))
    return State(tuple(kept))


def _gated_delta(mixer: GatedDelta, item_bytes: int) -> State:
    numbers = mixer.value_heads * mixer.key_dim * mixer.value_dim
    return State(fixed_bytes=(numbers + mixer.conv_channels * (mixer.conv_width - 1)) * _F32_BYTES)


def _channel_delta(mixer: ChannelDelta, item_bytes: int) -> State:
    numbers = mixer.heads * mixer.dim * mixer.dim
    return State(fixed_bytes=(numbers + mixer.conv_channels * (mixer.conv_width - 1)) * _F32_BYTES)


def _mamba2(mixer: Mamba2, item_bytes: int) -> State:
    matrix = mixer.inner * mixer.state_dim * _F32_BYTES
    return State(fixed_bytes=matrix + mixer.conv_channels * (mixer.conv_width - 1) * _F32_BYTES)


def _short_conv(mixer: ShortConv, item_bytes: int) -> State:
    return State(fixed_bytes=mixer.channels * (mixer.width - 1) * _F32_BYTES)


_STATES: dict[type, Callable[[Any, int], State]] = {
    Attention: _attention,
    LatentAttention: _latent,
    CompressedAttention: _compressed,
    GatedDelta: _gated_delta,
    ChannelDelta: _channel_delta,
    Mamba2: _mamba2,
    ShortConv: _short_conv,
}
