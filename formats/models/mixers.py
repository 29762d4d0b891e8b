"""Blocks that mix the tokens of a sequence by attention; ``recurrent`` has those that keep a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from krasis.formats.models.record import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_POSITIONS,
    Record,
    fail,
    number,
    required,
    size,
)
from krasis.formats.models.rope import QueryTemperature, Rope
from krasis.formats.models.selection import Selection

QkNorm = Literal["none", "head", "flat", "head_after_rope", "unweighted_after_rope"]
OutputGate = Literal["none", "channel", "channel_softplus", "head", "head_softplus"]


@dataclass(frozen=True, slots=True)
class Attention(Record):
    """Grouped-query attention.

    qk_norm: RMS norms of q and k, of each head or of the flat projection, before the rotation unless named
    otherwise. bias: of q, k and v; output_bias: of the output. window: keys j with 0 <= i - j < window are
    seen; chunk: only keys of the query's own chunk. sinks: one more logit a head in the softmax. output_gate:
    sigmoid or softplus of a projection, times the output of each channel or head. value_dim: of v where it
    differs from head_dim. shared_kv: v is k's projection, without rotation. value_norm: v's heads are
    normed without weight. value_scale: times v. clip: q, k and v are cut to +-clip. temperature: of queries
    by position.
    """

    KIND: ClassVar[str] = "attention"
    heads: int = size(MAX_HEADS)
    kv_heads: int = size(MAX_HEADS)
    head_dim: int = size(MAX_HEAD_DIM)
    rope: Rope | None = required()
    scale: float = number(1e-9, 1e9)
    qk_norm: QkNorm = "none"
    bias: bool = False
    output_bias: bool = False
    window: int | None = size(MAX_POSITIONS, 1, None)
    chunk: int | None = size(MAX_POSITIONS, 1, None)
    sinks: bool = False
    output_gate: OutputGate = "none"
    value_dim: int | None = size(MAX_HEAD_DIM, 1, None)
    shared_kv: bool = False
    value_norm: bool = False
    value_scale: float = number(1e-6, 1e6, 1.0)
    clip: float | None = number(1e-6, 1e9, None)
    temperature: QueryTemperature | None = None
    selection: Selection | None = None

    def check(self) -> None:
        if self.heads % self.kv_heads:
            raise fail(
                "query heads do not divide evenly among key/value heads",
                self,
                "heads",
                self.heads,
                f"a multiple of {self.kv_heads}",
            )
        if self.rope is not None and self.rope.dims > self.head_dim:
            raise fail(
                "more channels are rotated than there are", self, "rope", self.rope.dims, self.head_dim
            )

    @property
    def query_rows(self) -> int:
        """Output features of the query projection."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Output features of the key projection."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Channels of one value head."""
        return self.head_dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True, slots=True)
class LatentAttention(Record):
    """Multi-head latent attention (MLA): keys and values are projections of one latent vector a token.

    q_rank: of the query's latent, None for a direct projection. nope_dim and rope_dim: a head's channels
    without and with rotation (rope_dim may be 0). latent_eps: of the latents' norms. head_gate: the output of
    each head times a sigmoid.
    """

    KIND: ClassVar[str] = "latent_attention"
    heads: int = size(MAX_HEADS)
    q_rank: int | None = size(MAX_HIDDEN)
    kv_rank: int = size(MAX_HIDDEN)
    nope_dim: int = size(MAX_HEAD_DIM)
    rope_dim: int = size(MAX_HEAD_DIM, 0)
    value_dim: int = size(MAX_HEAD_DIM)
    rope: Rope | None = required()
    scale: float = number(1e-9, 1e9)
    latent_eps: float = number(0.0, 1.0, 1e-6)
    bias: bool = False
    head_gate: bool = False
    temperature: QueryTemperature | None = None
    selection: Selection | None = None

    def check(self) -> None:
        rotated = self.rope.dims if self.rope is not None else 0
        if rotated not in (0, self.rope_dim):
            raise fail("rotated channels differ from the rotary part", self, "rope", rotated, self.rope_dim)
        if self.selection is not None and self.q_rank is None:
            raise fail("an index needs the query's latent", self, "selection", "no q_rank", "q_rank")

    @property
    def index_parts(self) -> tuple[int, ...]:
        """Channels that an index of the layer's own keeps of each token; none without one."""
        index = self.selection
        if index is None or index.kind not in ("tokens", "pools") or index.reuses:
            return ()
        return index.key_parts

    @property
    def index_dim(self) -> int:
        """Channels of the key that an index of the layer's own keeps of each token; 0 without one."""
        return self.index_parts[0] if self.index_parts else 0


@dataclass(frozen=True, slots=True)
class CompressedAttention(Record):
    """Attention of DeepSeek-V4: one key that is its value too, raw in a window and compressed beyond it.

    q_rank: of the query's latent. ratio: tokens of one compressed entry, None for the window alone. overlap:
    entries take the window before into account. The output is projected in ``groups`` groups of
    ``group_rank`` channels each. selection: which compressed entries a query sees.
    """

    KIND: ClassVar[str] = "compressed_attention"
    heads: int = size(MAX_HEADS)
    head_dim: int = size(MAX_HEAD_DIM)
    q_rank: int = size(MAX_HIDDEN)
    groups: int = size(MAX_HEADS)
    group_rank: int = size(MAX_HIDDEN)
    rope: Rope = required()
    scale: float = number(1e-9, 1e9)
    window: int = size(MAX_POSITIONS)
    ratio: int | None = size(MAX_POSITIONS, 1, None)
    overlap: bool = False
    selection: Selection | None = None

    def check(self) -> None:
        if self.heads % self.groups:
            raise fail(
                "heads do not divide into groups", self, "heads", self.heads, f"multiple of {self.groups}"
            )
        if self.ratio is None and (self.overlap or self.selection is not None):
            raise fail("nothing is compressed", self, "ratio", "none", "a ratio")

    @property
    def kept_parts(self) -> tuple[int, ...]:
        """Channels of what is kept of each token beside its key: what entries are made of, keys and then
        gates, each for the entry to come and for its own where they overlap; the same of the index.
        """
        if self.ratio is None:
            return ()
        times = 4 if self.overlap else 2
        dims = (self.head_dim,) if self.selection is None else (self.head_dim, self.selection.dim)
        return tuple(dim for dim in dims for _ in range(times))
