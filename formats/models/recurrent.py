"""Blocks that mix the tokens of a sequence through a state of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from krasis.formats.models.record import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, Record, fail, number, size

_MAX_CONV = 64


@dataclass(frozen=True, slots=True)
class GatedDelta(Record):
    """The gated delta rule with one decay a head (Gated DeltaNet), after a short convolution of q, k and v.

    gate: of the output, by the projection z.
    """

    KIND: ClassVar[str] = "gated_delta"
    key_heads: int = size(MAX_HEADS)
    value_heads: int = size(MAX_HEADS)
    key_dim: int = size(MAX_HEAD_DIM)
    value_dim: int = size(MAX_HEAD_DIM)
    conv_width: int = size(_MAX_CONV)
    gate: Literal["silu", "sigmoid"] = "silu"

    def check(self) -> None:
        if self.value_heads % self.key_heads:
            raise fail(
                "value heads do not divide evenly among key heads",
                self,
                "value_heads",
                self.value_heads,
                f"a multiple of {self.key_heads}",
            )

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: all of q, k and v."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class ChannelDelta(Record):
    """The gated delta rule with one decay a channel (Kimi Delta Attention).

    decay_rank and gate_rank: of the two low-rank projections, None for full ones. lower_bound: the decay's
    logarithm is lower_bound * sigmoid(...), None for -exp(A_log) * softplus(...).
    """

    KIND: ClassVar[str] = "channel_delta"
    heads: int = size(MAX_HEADS)
    dim: int = size(MAX_HEAD_DIM)
    conv_width: int = size(_MAX_CONV)
    decay_rank: int | None = size(MAX_HIDDEN)
    gate_rank: int | None = size(MAX_HIDDEN)
    lower_bound: float | None = number(-1e3, 0.0, None)

    @property
    def key_heads(self) -> int:
        """As ``GatedDelta`` has it, like those that follow: heads and dims are all alike."""
        return self.heads

    @property
    def value_heads(self) -> int:
        """See ``key_heads``."""
        return self.heads

    @property
    def key_dim(self) -> int:
        """See ``key_heads``."""
        return self.dim

    @property
    def value_dim(self) -> int:
        """See ``key_heads``."""
        return self.dim

    @property
    def gate(self) -> Literal["sigmoid"]:
        """See ``key_heads``."""
        return "sigmoid"

    @property
    def conv_channels(self) -> int:
        """Channels of the convolutions: all of q, k and v."""
        return 3 * self.heads * self.dim


@dataclass(frozen=True, slots=True)
class Mamba2(Record):
    """A Mamba-2 scan. groups: of B and C, and of the gated norm. min_step: the least time step."""

    KIND: ClassVar[str] = "mamba2"
    heads: int = size(MAX_HEADS)
    head_dim: int = size(MAX_HEAD_DIM)
    state_dim: int = size(MAX_HEAD_DIM)
    groups: int = size(MAX_HEADS)
    conv_width: int = size(_MAX_CONV)
    conv_bias: bool = True
    bias: bool = False
    min_step: float = number(0.0, 1e3, 0.0)

    def check(self) -> None:
        if self.heads % self.groups:
            raise fail(
                "heads do not divide into groups", self, "heads", self.heads, f"multiple of {self.groups}"
            )

    @property
    def inner(self) -> int:
        """Channels between the projections."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_dim


@dataclass(frozen=True, slots=True)
class ShortConv(Record):
    """A gated depthwise convolution: output(c * conv(b * x)) of one projection [b, c, x], on all channels
    of the residual.
    """

    KIND: ClassVar[str] = "short_conv"
    channels: int = size(MAX_HIDDEN)
    width: int = size(_MAX_CONV)
    bias: bool = False
