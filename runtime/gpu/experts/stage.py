"""The routed experts of a layer, as prefill asks for them; several ways of computing them implement it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.buffers import Buffers


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's input and output on this rank: P rows of own tokens, G gathered rows (with one rank P = G).

    normed f32 [P, hidden]: what the router saw. x [G, hidden] 16-bit. ids i32 [G, top_k]: -1 where another
    rank has the expert. weights f32 [G, top_k]. hidden f32 [P, hidden]: the residual stream, to which the sum
    is added. With several ranks the sum goes to partial [G, hidden] instead. buffers: of the pass.
    num_tokens: of all ranks.
    """

    normed: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    hidden: torch.Tensor
    partial: torch.Tensor | None
    buffers: Buffers
    num_tokens: int


class ExpertStage(Protocol):
    """Computes the routed experts of each layer of a pass, in the order of the layers."""

    def begin(self, stream: Stream, num_tokens: int) -> None:
        """Before the first layer. stream: the compute stream, idle or not."""
        ...

    def run(self, stream: Stream, layer: int, step: Step) -> None:
        """Adds the layer's experts; enqueues only, unless the stage needs the host."""
        ...

    def end(self, stream: Stream) -> None:
        """After the last layer: enqueues what ``check`` reads."""
        ...

    def check(self) -> None:
        """After the stream was synchronised: raises NativeError unless every routed
        expert was executed once.
        """
        ...

    def abort(self) -> None:
        """After an error, with the device synchronised: forgets the pass."""
        ...


class Residents(Protocol):
    """Experts that live in VRAM. They do not change during a pass.

    host_addresses i64 [layers, experts]: device addresses, 0 where an expert is not resident. memory: what
    the addresses point into.
    """

    host_addresses: npt.NDArray[np.int64]
    memory: torch.Tensor

    def arrive(self, stream: Stream, layer: int) -> None:
        """What is submitted to stream from here on finds a layer's experts: the first pass may be early."""
        ...
