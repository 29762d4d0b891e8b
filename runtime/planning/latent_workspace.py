"""What latent attention needs of a GPU's memory beside its projections. Torch-free.

Few queries are taken to the latents, and attention runs on these (``absorbed``); many go over keys and values
that are made of the latents first (``expanded``), a few heads at a time: that costs the same however many
queries there are, and then a third of the multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from krasis.formats.layouts import padded_rows
from krasis.formats.limits import align_up
from krasis.formats.models.mixers import LatentAttention

LEAST_EXPANDED = 64
"""Queries of one sequence from which on keys and values are expanded: an estimate, by the traffic of the
kernel's 32 heads a block against the expansion's product; scripts/measure_latent.py measures it.
"""
EXPANDED_BYTES = 256 * 2**20
"""At most so much room for the keys and values of as many heads as fit, with their weights in 16 bits."""
MAX_SPLITS, SPLIT_KEYS = 128, 32
INDEX_ROWS = 256
"""Rows of which an index makes its queries at a time, and scores as many as there is room for."""
SCORE_BYTES = 64 * 2**20
"""At most so much room for scores, but for one row at least."""
_BLOCKS = 256  # of attention over latents: enough for a GPU
_QUERIES = 32  # of a block


def qkv_columns(mixer: LatentAttention) -> int:
    """16-bit columns of a token between the projections: queries, and in f32 the latents of queries and
    keys, with the queries' normed, and the index's keys."""
    queries = padded_rows(mixer.heads * (mixer.nope_dim + mixer.rope_dim))
    latents = 2 * padded_rows(mixer.kv_rank + mixer.rope_dim)
    return queries + latents + 3 * padded_rows(mixer.q_rank or 0) + 2 * mixer.index_dim


def head_matrices(mixer: LatentAttention, num_keys: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of what is expanded for a head: its weights that make keys and values, then these, the
    values as wide as the keys or wider."""
    head_dim = mixer.nope_dim + mixer.rope_dim
    weights = (mixer.kv_rank, mixer.nope_dim), (mixer.value_dim, mixer.kv_rank)
    return (*weights, (num_keys, head_dim), (num_keys, max(head_dim, mixer.value_dim)))


def head_numbers(mixer: LatentAttention, num_keys: int) -> int:
    """The numbers of ``head_matrices``."""
    return sum(rows * columns for rows, columns in head_matrices(mixer, num_keys))


def expanded_bytes(mixer: LatentAttention, max_context: int) -> int:
    """Room for the heads of a layer, all of them if they fit in EXPANDED_BYTES at the longest context."""
    return min(EXPANDED_BYTES, 2 * mixer.heads * head_numbers(mixer, max_context))


def latent_splits(num_rows: int, num_heads: int, num_keys: int) -> int:
    """Over how many blocks up to num_keys keys are split. num_rows: with caches of their own; rows of one
    sequence count as one, of all their heads."""
    tiles = max(1, num_rows) * -(-num_heads // _QUERIES)
    return max(1, min(MAX_SPLITS, _BLOCKS // tiles, -(-num_keys // SPLIT_KEYS)))


def split_bytes(num_rows: int, num_heads: int, kv_rank: int) -> int:
    """At most so much for the sums of the splits of up to num_rows queries."""
    tiles = num_rows * -(-num_heads // _QUERIES)
    blocks = min(tiles * MAX_SPLITS, max(_BLOCKS, tiles))
    return blocks * _QUERIES * (kv_rank + 2) * 4 + 16


@dataclass(frozen=True, slots=True)
class IndexShape:
    """Of a model's indices over tokens: the positions that each row attends to, channels of all heads, heads,
    and channels of the queries' latents; the most of all layers."""

    budget: int
    size: int
    heads: int
    q_rank: int


def index_shape(mixers: Sequence[LatentAttention]) -> IndexShape | None:
    """None without indices."""
    own = [(mixer, mixer.selection) for mixer in mixers if mixer.selection is not None and mixer.index_dim]
    if not own:
        return None
    return IndexShape(
        budget=max(index.budget for _, index in own),
        size=max(index.heads * index.dim for _, index in own),
        heads=max(index.heads for _, index in own),
        q_rank=max(mixer.q_rank or 0 for mixer, _ in own),
    )


def score_floats(num_rows: int, max_context: int) -> int:
    """Room for the scores of up to num_rows rows."""
    row = align_up(max_context, 4)
    return max(row, min(num_rows * row, SCORE_BYTES // 4))
