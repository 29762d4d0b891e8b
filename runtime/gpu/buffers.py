"""One block of device memory for the activations of a pass, cut as ``planning/workspace.py`` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.kernels.gpu_kernels import Routing
from krasis.runtime.planning.shape import AnyModel, shape_of
from krasis.runtime.planning.workspace import (
    Region,
    WorkspaceLayout,
    rows_per_rank,
    workspace_bytes,
    workspace_layout,
)


@dataclass(frozen=True, slots=True)
class IndexBuffers:
    """Of an index over tokens: what rows attend to, which later layers may read, and of some rows what it
    reads and makes of that."""

    chosen: torch.Tensor  # [P, budget] i32
    x: torch.Tensor  # [some, hidden] f32
    latents: torch.Tensor  # [some, q_rank] f32
    q: torch.Tensor  # [some, channels of its heads] f32
    weights: torch.Tensor  # [some, heads] f32
    scores: torch.Tensor  # [1, room] f32


@dataclass(frozen=True, slots=True)
class Buffers:
    """Views for a pass of T tokens: P rows of this rank's tokens, G = P * ranks gathered rows. See
    ``planning.workspace`` for which share memory.

    With one rank the gathered tensors are the local ones, and there is no partial.
    """

    num_tokens: int
    hidden: torch.Tensor  # [P, hidden] f32, the residual stream
    x: torch.Tensor  # [P, hidden] 16-bit
    ids: torch.Tensor  # [P, top_k] i32
    weights: torch.Tensor  # [P, top_k] f32
    gathered_x: torch.Tensor  # [G, hidden]
    gathered_ids: torch.Tensor  # [G, top_k]
    gathered_weights: torch.Tensor  # [G, top_k]
    qkv: torch.Tensor  # [P, qkv_columns] 16-bit
    attended: torch.Tensor  # [P, attention_size] 16-bit
    delta_gates: torch.Tensor  # [P, gate_columns] f32
    delta_mixed: torch.Tensor  # [P, delta_channels] 16-bit
    delta_chunks: torch.Tensor  # [chunks at once, heads * DELTA_CHUNK_BYTES] uint8
    delta_x: torch.Tensor  # [G, hidden] 16-bit, with several ranks, as the four that follow
    gathered_gates: torch.Tensor  # [G, gate_columns] f32
    ordered_gates: torch.Tensor  # [G, gate_columns] f32
    delta_projected: torch.Tensor  # [rows at once, qkv_rows] 16-bit
    delta_out: torch.Tensor  # [rows at once, attention_size] 16-bit
    latent: torch.Tensor  # [few, heads * kv_rank] 16-bit, queries of latent attention
    latent_splits: torch.Tensor  # [1, bytes], sums of the splits of its keys
    index: IndexBuffers
    expanded: torch.Tensor  # [1, room] 16-bit, keys and values of some of its heads
    shared_kv: torch.Tensor | None  # [P + G, bytes of a token's keys and values], with several ranks
    window_kv: torch.Tensor  # [P + a window, bytes of a token's keys and values], of one sequence in a ring
    normed: torch.Tensor  # [P, hidden] f32
    router_logits: torch.Tensor  # [P, num_experts] f32
    mlp: torch.Tensor  # [P, mlp_columns] 16-bit, what an MLP that every token takes has between its products
    mlp_gated: torch.Tensor  # [P, mlp_intermediate] 16-bit
    shared: torch.Tensor  # [P, hidden] 16-bit, a gated shared expert's output
    shared_gate: torch.Tensor  # [P, 1] f32
    added: torch.Tensor  # [P, hidden] f32, what is normed before it is added
    residual: torch.Tensor  # [P, hidden] f32, meanwhile
    latent_x: torch.Tensor  # [P, expert width] 16-bit, of experts between two projections, as the next two
    latent_rows: torch.Tensor  # [P, expert width] f32, the same
    latent_sum: torch.Tensor  # [P, expert width] f32, what they add up
    streams: torch.Tensor  # [P, streams * hidden] f32, the residual where there are several
    stream_logits: torch.Tensor  # [P, streams] f32, of how much each takes of what a block adds
    table_rows: torch.Tensor  # [P, table_columns] 16-bit, of hashed tables
    stream_normed: torch.Tensor  # [rows at once, streams * hidden] f32
    stream_gates: torch.Tensor  # the same
    stream_low: torch.Tensor  # [rows at once, rank] f32
    table_values: torch.Tensor  # [rows at once, hidden] f32
    gated: torch.Tensor  # [G * top_k, intermediate] 16-bit
    slots: torch.Tensor  # [G * top_k, expert width] 16-bit
    partial: torch.Tensor | None  # [G, hidden] f32 or 16-bit, with several ranks
    received: torch.Tensor | None  # the same, of other ranks: in 16 bits gathered_x
    ordered_x: torch.Tensor  # [T, hidden] 16-bit
    logits: torch.Tensor  # [LOGIT_ROWS or fewer, padded vocabulary] f32
    routing: Routing

    def own(self, num_rows: int) -> Buffers:
        """The same, local rows cut to the first num_rows."""
        cut = {name: getattr(self, name)[:num_rows] for name in _LOCAL}
        return replace(self, **cut)


_LOCAL = (
    "hidden",
    "x",
    "ids",
    "weights",
    "qkv",
    "attended",
    "delta_gates",
    "delta_mixed",
    "normed",
    "router_logits",
    "mlp",
    "mlp_gated",
    "shared",
    "shared_gate",
    "added",
    "residual",
    "latent_x",
    "latent_rows",
    "latent_sum",
    "streams",
    "stream_logits",
    "table_rows",
)
_STREAMS = ("streams", "stream_logits", "stream_normed", "stream_gates", "stream_low", "table_values")
_OF_FEW = ("added", "residual", "latent_rows", "latent_sum", *_STREAMS)


class Workspace:
    """Memory for passes of up to max_tokens tokens. exact_tokens: up to so many have their partial sums in
    f32, no more than ``planning.sums`` says. windows: whether passes may attend in rings, of one rank.
    Raises OutOfDeviceMemoryError."""

    def __init__(
        self,
        device: Device,
        model: AnyModel,
        dtype: torch.dtype,
        max_tokens: int,
        num_ranks: int,
        exact_tokens: int = 0,
        *,
        windows: bool = True,
    ) -> None:
        self._windows = windows and num_ranks == 1
        self.max_tokens, self.exact_tokens = max_tokens, exact_tokens
        shape = shape_of(model)
        self._shape, self._dtype, self._num_ranks = shape, dtype, num_ranks
        num_bytes = workspace_bytes(shape, max_tokens, num_ranks, windows=self._windows)
        self.memory = device.empty((num_bytes,), torch.uint8)
        self.routing = Routing.allocate(
            device,
            rows_per_rank(max_tokens, num_ranks) * num_ranks,
            shape.num_experts_per_token,
            shape.num_experts,
        )

    def view(self, num_tokens: int, num_ranks: int | None = None) -> Buffers:
        """The buffers of a pass. num_ranks: as it was made for; 1: of a pass without the other ranks.

        Raises NativeError for more tokens than there is room for.
        """
        ranks = num_ranks or self._num_ranks
        if not self.fits(num_tokens, ranks):
            raise NativeError("the workspace is too small", got=num_tokens, limit=self.max_tokens)
        return self._cut(self._layout(num_tokens, ranks), num_tokens, ranks == 1)

    def fits(self, num_tokens: int, num_ranks: int) -> bool:
        """Whether there is room for a pass of so many tokens."""
        needed = self._layout(num_tokens, num_ranks).total_bytes
        return 0 < num_tokens <= self.max_tokens and needed <= self.memory.numel()

    def between_passes(self, num_tokens: int) -> torch.Tensor:
        """Bytes that a pass of so many tokens overwrites: as many on each rank, for equally many tokens."""
        return self.memory[: workspace_bytes(self._shape, num_tokens, self._num_ranks, windows=self._windows)]

    def give_up(self) -> None:
        """Frees the memory, so that a smaller one fits: what is still submitted keeps what it uses."""
        self.memory = self.memory[:0].clone()

    def _layout(self, num_tokens: int, num_ranks: int) -> WorkspaceLayout:
        exact = num_ranks > 1 and num_tokens <= self.exact_tokens
        return workspace_layout(self._shape, num_tokens, num_ranks, exact=exact, windows=self._windows)

    def _cut(self, layout: WorkspaceLayout, num_tokens: int, alone: bool) -> Buffers:
        def rows(name: str, dtype: torch.dtype) -> torch.Tensor:
            region = layout.regions.get(name)
            if region is None:  # the model has no use for it
                return self.memory[:0].view(dtype).view(0, 1)
            return _view(self.memory, region, dtype)

        half, exact = self._dtype, "received" in layout.regions
        sums, gathered_x = torch.float32 if exact else half, rows("gathered_x", half)
        x, ids, weights = rows("x", half), rows("ids", torch.int32), rows("weights", torch.float32)
        return Buffers(
            num_tokens=num_tokens,
            hidden=rows("hidden", torch.float32),
            x=x,
            ids=ids,
            weights=weights,
            gathered_x=x if alone else gathered_x,
            gathered_ids=ids if alone else rows("gathered_ids", torch.int32),
            gathered_weights=weights if alone else rows("gathered_weights", torch.float32),
            qkv=rows("qkv", half),
            attended=rows("attended", half),
            delta_gates=rows("delta_gates", torch.float32),
            delta_mixed=rows("delta_mixed", half),
            delta_chunks=rows("delta_chunks", torch.uint8),
            delta_x=rows("delta_x", half),
            gathered_gates=rows("gathered_gates", torch.float32),
            ordered_gates=rows("ordered_gates", torch.float32),
            delta_projected=rows("delta_projected", half),
            delta_out=rows("delta_out", half),
            latent=rows("latent", half),
            latent_splits=rows("latent_splits", torch.uint8),
            index=_index_buffers(rows),
            expanded=rows("expanded", half),
            shared_kv=None if alone else rows("shared_kv", torch.uint8),
            window_kv=rows("window_kv", torch.uint8),
            normed=rows("normed", torch.float32),
            router_logits=rows("router_logits", torch.float32),
            mlp=rows("mlp", half),
            mlp_gated=rows("mlp_gated", half),
            shared=rows("shared", half),
            shared_gate=rows("shared_gate", torch.float32),
            **_of_few(rows, half),
            gated=rows("gated", half),
            slots=rows("slots", half),
            partial=None if alone else rows("partial", sums),
            received=None if alone else rows("received", sums) if exact else gathered_x,
            ordered_x=x if alone else rows("ordered_x", half)[:num_tokens],
            logits=rows("logits", torch.float32),
            routing=self.routing,
        )


def _view(memory: torch.Tensor, region: Region, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of a block of memory."""
    raw = memory.narrow(0, region.offset_bytes, region.num_bytes).view(dtype)
    return raw.view(region.rows, region.columns)


def _index_buffers(rows: Callable[[str, torch.dtype], torch.Tensor]) -> IndexBuffers:
    names = ("x", "latents", "q", "weights", "scores")
    floats = (rows(f"index_{name}", torch.float32) for name in names)
    return IndexBuffers(rows("chosen", torch.int32), *floats)


def _of_few(rows: Callable[[str, torch.dtype], torch.Tensor], half: torch.dtype) -> dict[str, torch.Tensor]:
    """What few models have: norms after blocks, experts between projections, several residual streams."""
    found = {name: rows(name, torch.float32) for name in _OF_FEW}
    return found | {name: rows(name, half) for name in ("table_rows", "latent_x")}
