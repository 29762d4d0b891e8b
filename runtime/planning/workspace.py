"""The activations of one prefill pass on a GPU: what lies where in one block of memory. Torch-free.

The planner sizes the block by this table and ``runtime/gpu/buffers.py`` cuts it by the same one, so what is
planned is what is allocated. Three phases of a layer share one range, because each is dead when the next
begins:

- attention: qkv and the attention's output, of this rank's tokens; for the gated delta rule what its
  convolution gives, and what some chunks of its tokens need of themselves; for latent attention what
  ``latent_workspace`` says; of a layer with a ring a sequence's keys and values that the pass sees, in the
  order of their positions; with several ranks all tokens' keys and values, on their way to the cache;
- routing: the normed input of the router and its logits in f32, of this rank's tokens; what an MLP that
  every token takes has between its products, and a gated shared expert's output;
- experts: for every slot (token x choice), the gated product and the expert's output in 16 bits; with several
  ranks also the rank's partial sums, in 16 bits or, as ``sums`` says, in f32: then those of others come where
  the slots were;
- head, after the last layer: logits of a few rows; with several ranks also the rows in the order of the
  tokens.

Beside them live, through the whole layer: the f32 residual stream, its 16-bit norm, expert ids and weights,
the gates of the delta rule (made of the router's input, before the projections take its place);
with several ranks the gathered 16-bit norms, ids and weights of all tokens; with norms after blocks two more
f32 rows; of experts between two projections what they read, in both types, and add up;
what an index over tokens chose, which layers that take the choice of another read;
with several residual streams these, of which hidden is what a block adds, what it reads, and the rows of
hashed tables. The tables of slots sorted by expert are memory of their own (``Routing.allocate``):
``routing_bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from krasis.formats.layouts import padded_rows
from krasis.runtime.planning import latent_workspace as latent
from krasis.runtime.planning.shape import AnyModel, ModelShape, largest_shape
from krasis.runtime.planning.sums import exact_tokens

ALIGNMENT_BYTES = 256
F32, I32, HALF, BYTE = 4, 4, 2, 1
LOGIT_ROWS = 64  # tokens whose logits are computed at once when all are wanted
SCRATCH_BYTES = 64 * 2**20
"""Dequantised weights on their way to a library's product, where there are many rows
(``gpu/many_rows.py``).
"""
DELTA_CHUNK_TOKENS, DELTA_CHUNK_BYTES = 64, 16896
"""Of the gated delta rule in chunks, a chunk and a head: ``KRASIS_CUDA_DELTA_CHUNK_BYTES``."""
DELTA_CHUNKS = 32
"""Chunks at once: all heads of so many fill any GPU."""
DELTA_ROWS = DELTA_CHUNKS * DELTA_CHUNK_TOKENS
"""Rows at once where each rank computes all."""
STREAM_ROWS = 1024
"""Rows at once between the blocks of a model with several residual streams."""
_M_BLOCKS = (16, 128)  # the least and the most rows of a block of the grouped product


@dataclass(frozen=True, slots=True)
class Region:
    """Rows of equal size at an offset of the block."""

    offset_bytes: int
    rows: int
    columns: int
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Without what alignment adds."""
        return self.rows * self.columns * self.item_bytes


@dataclass(frozen=True, slots=True)
class WorkspaceLayout:
    """Regions by name and the size of the block that holds them."""

    regions: Mapping[str, Region]
    total_bytes: int


def rows_per_rank(num_tokens: int, num_ranks: int) -> int:
    """Tokens of one rank, rounded up: rows of a rank's own buffers."""
    return -(-num_tokens // num_ranks)


def workspace_layout(
    model: AnyModel, num_tokens: int, num_ranks: int, *, exact: bool = False, windows: bool | None = None
) -> WorkspaceLayout:
    """Where the activations of num_tokens tokens lie on one of num_ranks GPUs. exact: partial sums in f32.
    windows: whether passes attend in rings; None: as they do on so many ranks."""
    a = largest_shape(model)
    top_k = a.num_experts_per_token
    own = rows_per_rank(num_tokens, num_ranks)
    gathered, slots = own * num_ranks, own * num_ranks * top_k
    cursor = _Cursor()
    cursor.add("hidden", own, a.hidden_size, F32)
    cursor.add("x", own, a.hidden_size, HALF)
    cursor.add("ids", own, top_k, I32)
    cursor.add("weights", own, top_k, F32)
    if num_ranks > 1:
        cursor.add("gathered_x", gathered, a.hidden_size, HALF)
        cursor.add("gathered_ids", gathered, top_k, I32)
        cursor.add("gathered_weights", gathered, top_k, F32)
    if a.gate_columns:
        cursor.add("delta_gates", own, a.gate_columns, F32)
    for name in ("added", "residual") if a.post_norms else ():
        cursor.add(name, own, a.hidden_size, F32)
    if a.latent_experts:
        _add_latent_experts(cursor, a, own)
    if a.index is not None:
        cursor.add("chosen", own, a.index.budget, I32)
    if a.streams:
        _add_streams(cursor, a, own)
    phases = cursor.end_bytes
    cursor.add("qkv", own, a.qkv_columns, HALF)
    cursor.add("attended", own, a.attention_size, HALF)
    if a.has_states:
        _add_delta(cursor, a, own, num_ranks)
    if a.latent_heads:
        _add_latent(cursor, a, own)
    if a.window_bytes and (num_ranks == 1 if windows is None else windows):
        cursor.add("window_kv", own + a.window, a.window_bytes, BYTE)
    if num_ranks > 1:
        cursor.add("shared_kv", own + gathered, a.kv_bytes, BYTE)
    cursor.back_to(phases)
    if not a.streams:
        cursor.add("normed", own, a.hidden_size, F32)
    cursor.add("router_logits", own, a.num_experts, F32)
    _add_mlp(cursor, a, own)
    cursor.back_to(phases)
    if num_ranks > 1:
        _add_sums(cursor, a, gathered, exact)
    cursor.add("gated", slots, a.expert_intermediate_size, HALF)
    cursor.add("slots", slots, a.expert_width, HALF)
    cursor.back_to(phases)
    cursor.add("logits", min(gathered, LOGIT_ROWS), padded_rows(a.vocab_size), F32)
    if num_ranks > 1:
        cursor.add("ordered_x", gathered, a.hidden_size, HALF)
    return WorkspaceLayout(MappingProxyType(cursor.regions), cursor.most_bytes)


def _add_latent_experts(cursor: _Cursor, a: ModelShape, own: int) -> None:
    """What experts between two projections read, in both types, and what they add up."""
    cursor.add("latent_x", own, a.latent_experts, HALF)
    cursor.add("latent_rows", own, a.latent_experts, F32)
    cursor.add("latent_sum", own, a.latent_experts, F32)


def _add_mlp(cursor: _Cursor, a: ModelShape, own: int) -> None:
    """What an MLP that every token takes has between its products, and a gated shared expert's output."""
    if a.mlp_columns:
        cursor.add("mlp", own, a.mlp_columns, HALF)
        cursor.add("mlp_gated", own, a.mlp_intermediate, HALF)
    if a.shared_gate:
        cursor.add("shared", own, a.hidden_size, HALF)
        cursor.add("shared_gate", own, 1, F32)


def _add_streams(cursor: _Cursor, a: ModelShape, own: int) -> None:
    """The streams, what a block reads of them and the rows of hashed tables; then, where phases share
    memory, what gates and tables need of STREAM_ROWS rows at a time."""
    rows, wide = min(own, STREAM_ROWS), a.streams * a.hidden_size
    cursor.add("streams", own, wide, F32)
    cursor.add("stream_logits", own, a.streams, F32)
    cursor.add("normed", own, a.hidden_size, F32)
    cursor.add("table_rows", own, a.table_columns, HALF)
    phases = cursor.end_bytes
    cursor.add("stream_normed", rows, wide, F32)
    cursor.add("stream_gates", rows, wide, F32)
    cursor.add("stream_low", rows, a.stream_rank, F32)
    if a.table_columns:
        cursor.add("table_values", rows, a.hidden_size, F32)
    cursor.back_to(phases)


def _add_delta(cursor: _Cursor, a: ModelShape, own: int, num_ranks: int) -> None:
    """On several ranks each computes all tokens, DELTA_ROWS at a time."""
    rows, gathered = own, own * num_ranks
    if num_ranks > 1:
        rows = min(gathered, DELTA_ROWS)
        cursor.add("delta_x", gathered, a.hidden_size, HALF)
        cursor.add("gathered_gates", gathered, a.gate_columns, F32)
        cursor.add("ordered_gates", gathered, a.gate_columns, F32)
        cursor.add("delta_projected", rows, a.qkv_columns, HALF)
        cursor.add("delta_out", rows, a.attention_size, HALF)
    cursor.add("delta_mixed", rows, a.delta_channels, HALF)
    chunks = min(-(-rows // DELTA_CHUNK_TOKENS), DELTA_CHUNKS)
    cursor.add("delta_chunks", chunks, a.delta_heads * DELTA_CHUNK_BYTES, BYTE)


def _add_latent(cursor: _Cursor, a: ModelShape, own: int) -> None:
    few = min(own, latent.LEAST_EXPANDED - 1)
    cursor.add("latent", few, a.latent_heads * a.latent_rank, HALF)
    cursor.add("latent_splits", 1, latent.split_bytes(few, a.latent_heads, a.latent_rank), 1)
    if own >= latent.LEAST_EXPANDED:
        cursor.add("expanded", 1, a.expanded_bytes // HALF, HALF)
    if a.index is not None:
        some = min(own, latent.INDEX_ROWS)
        cursor.add("index_x", some, a.hidden_size, F32)
        cursor.add("index_latents", some, a.index.q_rank, F32)
        cursor.add("index_q", some, a.index.size, F32)
        cursor.add("index_weights", some, a.index.heads, F32)
        cursor.add("index_scores", 1, latent.score_floats(some, a.max_context), F32)


def _add_sums(cursor: _Cursor, a: ModelShape, gathered: int, exact: bool) -> None:
    """What a rank sends, and in f32 what it receives, where slots lie, which are summed up then."""
    cursor.add("partial", gathered, a.hidden_size, F32 if exact else HALF)
    behind = cursor.end_bytes
    if exact:
        cursor.add("received", gathered, a.hidden_size, F32)
        cursor.back_to(behind)


def workspace_bytes(model: AnyModel, num_tokens: int, num_ranks: int, *, windows: bool | None = None) -> int:
    """The block for passes of up to num_tokens tokens: shorter ones may have their sums in f32."""
    few = min(num_tokens, exact_tokens(model, num_ranks))
    most = workspace_layout(model, num_tokens, num_ranks, windows=windows).total_bytes
    return max(most, workspace_layout(model, few, num_ranks, exact=True).total_bytes) if few else most


def activation_bytes(model: AnyModel, num_tokens: int, num_ranks: int) -> int:
    """All that a pass of num_tokens tokens writes but the KV cache."""
    block = workspace_bytes(model, num_tokens, num_ranks)
    return block + routing_bytes(model, num_tokens, num_ranks)


def routing_bytes(model: AnyModel, num_tokens: int, num_ranks: int) -> int:
    """At most so much for the tables of num_tokens tokens' slots: slots sorted by expert, each expert padded
    to whole blocks, the expert of each block, and a few words an expert (``krasis_cuda_moe_align``).
    """
    arch = largest_shape(model)
    slots = rows_per_rank(num_tokens, num_ranks) * num_ranks * arch.num_experts_per_token
    experts, (least, most) = arch.num_experts, _M_BLOCKS
    padded = slots + min(slots, experts) * (most - 1)
    blocks = slots // least + min(slots, experts) + 1
    return I32 * (padded + blocks + 2 * experts + 2) + 8 * ALIGNMENT_BYTES


class _Cursor:
    """Places regions one after the other."""

    def __init__(self) -> None:
        self.regions: dict[str, Region] = {}
        self.end_bytes = 0
        self.most_bytes = 0

    def add(self, name: str, rows: int, columns: int, item_bytes: int) -> None:
        region = Region(self.end_bytes, rows, columns, item_bytes)
        self.regions[name] = region
        end = region.offset_bytes + region.num_bytes
        self.end_bytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.most_bytes = max(self.most_bytes, self.end_bytes)

    def back_to(self, offset_bytes: int) -> None:
        """What follows shares memory with what was placed since."""
        self.end_bytes = offset_bytes
