"""One block of device memory for the activations of a pass, cut as ``planning/workspace.py`` says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.kernels.gpu_kernels import Routing
from krasis.runtime.planning.shape import AnyModel, shape_of
from krasis.runtime.planning.workspace import WorkspaceLayout, rows_per_rank, workspace_layout


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
    delta_gates: torch.Tensor  # [P, 2 * delta_heads] f32
    delta_mixed: torch.Tensor  # [P, delta_channels] 16-bit
    delta_chunks: torch.Tensor  # [chunks at once, heads * DELTA_CHUNK_BYTES] uint8
    delta_x: torch.Tensor  # [G, hidden] 16-bit, with several ranks, as the four that follow
    gathered_gates: torch.Tensor  # [G, 2 * delta_heads] f32
    ordered_gates: torch.Tensor  # [G, 2 * delta_heads] f32
    delta_projected: torch.Tensor  # [rows at once, qkv_rows] 16-bit
    delta_out: torch.Tensor  # [rows at once, attention_size] 16-bit
    latent: torch.Tensor  # [few, heads * kv_rank] 16-bit, queries of latent attention
    latent_splits: torch.Tensor  # [1, bytes], sums of the splits of its keys
    expanded: torch.Tensor  # [1, room] 16-bit, keys and values of some of its heads
    normed: torch.Tensor  # [P, hidden] f32
    router_logits: torch.Tensor  # [P, num_experts] f32
    mlp: torch.Tensor  # [P, mlp_columns] 16-bit, what an MLP that every token takes has between its products
    mlp_gated: torch.Tensor  # [P, mlp_intermediate] 16-bit
    shared: torch.Tensor  # [P, hidden] 16-bit, a gated shared expert's output
    shared_gate: torch.Tensor  # [P, 1] f32
    added: torch.Tensor  # [P, hidden] f32, what is normed before it is added
    residual: torch.Tensor  # [P, hidden] f32, meanwhile
    gated: torch.Tensor  # [G * top_k, intermediate] 16-bit
    slots: torch.Tensor  # [G * top_k, hidden] 16-bit
    partial: torch.Tensor | None  # [G, hidden] 16-bit, with several ranks
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
)


class Workspace:
    """Memory for passes of up to max_tokens tokens. Raises OutOfDeviceMemoryError."""

    def __init__(
        self, device: Device, model: AnyModel, dtype: torch.dtype, max_tokens: int, num_ranks: int
    ) -> None:
        self.max_tokens = max_tokens
        shape = shape_of(model)
        self._shape, self._dtype, self._num_ranks = shape, dtype, num_ranks
        self.memory = device.empty((workspace_layout(shape, max_tokens, num_ranks).total_bytes,), torch.uint8)
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
        return self._cut(workspace_layout(self._shape, num_tokens, ranks), num_tokens, ranks == 1)

    def fits(self, num_tokens: int, num_ranks: int) -> bool:
        """Whether there is room for a pass of so many tokens."""
        needed = workspace_layout(self._shape, num_tokens, num_ranks).total_bytes
        return 0 < num_tokens <= self.max_tokens and needed <= self.memory.numel()

    def give_up(self) -> None:
        """Frees the memory, so that a smaller one fits: what is still submitted keeps what it uses."""
        self.memory = self.memory[:0].clone()

    def _cut(self, layout: WorkspaceLayout, num_tokens: int, alone: bool) -> Buffers:
        def rows(name: str, dtype: torch.dtype) -> torch.Tensor:
            region = layout.regions.get(name)
            if region is None:  # the model has no use for it
                return self.memory[:0].view(dtype).view(0, 1)
            end = region.offset_bytes + region.num_bytes
            raw = self.memory[region.offset_bytes : end].view(dtype)
            return raw.view(region.rows, region.columns)

        half = self._dtype
        x, ids, weights = rows("x", half), rows("ids", torch.int32), rows("weights", torch.float32)
        return Buffers(
            num_tokens=num_tokens,
            hidden=rows("hidden", torch.float32),
            x=x,
            ids=ids,
            weights=weights,
            gathered_x=x if alone else rows("gathered_x", half),
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
            expanded=rows("expanded", half),
            normed=rows("normed", torch.float32),
            router_logits=rows("router_logits", torch.float32),
            mlp=rows("mlp", half),
            mlp_gated=rows("mlp_gated", half),
            shared=rows("shared", half),
            shared_gate=rows("shared_gate", torch.float32),
            added=rows("added", torch.float32),
            residual=rows("residual", torch.float32),
            gated=rows("gated", half),
            slots=rows("slots", half),
            partial=None if alone else rows("partial", half),
            ordered_x=x if alone else rows("ordered_x", half)[:num_tokens],
            logits=rows("logits", torch.float32),
            routing=self.routing,
        )
