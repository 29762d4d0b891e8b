"""Wrapper of the kernel by which a rank takes what another GPU of the host has sent."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    HALVES,
    I32,
    I64,
    U8,
    matrix,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import TakeArgs

_WORD = (1,)


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Rows [T, hidden] with what a router chose for them: ids int32 and weights float32 [T, K]."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class FlagWait:
    """Until flag >= epoch (int64 [1] both). Gives up after timeout_ns, and at once if timeouts int64 [1] is
    not 0, to which tag is then added."""

    flag: torch.Tensor
    epoch: torch.Tensor
    timeout_ns: int
    timeouts: torch.Tensor
    tag: int


class RankKernels(Launcher):
    """T: tokens, K: experts a token, E: experts."""

    def take(
        self,
        stream: Stream,
        wait: FlagWait,
        sent: RoutedRows,
        held: torch.Tensor,
        own: RoutedRows,
        counts: torch.Tensor,
        zeros: torch.Tensor | None = None,
    ) -> None:
        """Waits, then own = sent (float32 rows, pinned): rows in own's 16 bits, and only the ids of which
        held uint8 [E] is not 0, -1 elsewhere. counts int64 [E] grow by how often each expert was chosen.

        zeros float32 [T, hidden], if it is there, becomes 0. If it gave up, own.ids are all -1. hidden % 8
        == 0.
        """
        (tokens, columns), top_k = matrix(sent.rows, "take.sent"), matrix(sent.ids, "take.ids")[1]
        choices, num_experts = (tokens, top_k), len(held)
        require(columns % 8 == 0, "not a multiple of 8", "take.sent", columns, 8)
        require(wait.tag > 0, "tag must be positive", "take", wait.tag, 1)
        args = TakeArgs(
            flag=pointer(wait.flag, _WORD, I64, "take.flag"),
            epoch=pointer(wait.epoch, _WORD, I64, "take.epoch"),
            timeout_ns=wait.timeout_ns,
            timeouts=pointer(wait.timeouts, _WORD, I64, "take.timeouts"),
            tag=wait.tag,
            normed=vector_pointer(sent.rows, (tokens, columns), F32, "take.sent"),
            ids=pointer(sent.ids, choices, I32, "take.ids"),
            weights=pointer(sent.weights, choices, F32, "take.weights"),
            held=pointer(held, (num_experts,), U8, "take.held"),
            rows=tokens,
            columns=columns,
            top_k=top_k,
            num_experts=num_experts,
            dtype=CODES[own.rows.dtype],
            x=vector_pointer(own.rows, (tokens, columns), HALVES, "take.own"),
            own_ids=pointer(own.ids, choices, I32, "take.own_ids"),
            own_weights=pointer(own.weights, choices, F32, "take.own_weights"),
            counts=pointer(counts, (num_experts,), I64, "take.counts"),
        )
        if zeros is not None:
            args.zeros = vector_pointer(zeros, (tokens, columns), F32, "take.zeros")
        reads = (wait.flag, wait.epoch, wait.timeouts, sent.rows, sent.ids, sent.weights, held, counts)
        writes = present(wait.timeouts, own.rows, own.ids, own.weights, counts, zeros)
        if tokens:
            self.submit(stream, "take", (byref(args),), reads, writes)
