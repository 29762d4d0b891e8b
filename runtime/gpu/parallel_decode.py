"""Rank 0's side of decode over ranks: each layer's rows go to the other GPUs of the host, which compute the
experts they hold; their sums come back, while the CPU computes what no GPU holds.

All of it is one launch a layer in rank 0's captured graph, and one for every other rank, through pinned
memory that the ranks share (``parallel_memory``), and on the host one bell a token. Measured on two H200,
hidden 4096 and one row: 25 us a layer more than one GPU that holds all experts. (Estimated were ``send`` 4
us, 16 KiB over PCIe, the other rank's ``take`` 5 us, its own ``send`` 4 us, ``receive`` 4 us a rank; NCCL's
broadcast and reduce: 20 to 30 us, and both sides must launch them.)

Every expert is computed once: rank r holds only experts of its own share, so none is resident twice;
``holders`` tells rank 0's router which GPU has an expert, and the rest is the CPU's. What a rank holds
changes only between tokens, and it says so before it is ready for the next.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel_memory import RankMemory

PATIENCE_S = 0.05  # before the host looks whether the job still lives
HERE, ELSEWHERE = 1, 2  # what ``holders`` says of an expert; 0: no GPU has it


class RankLink:
    """holders u8 [layers, experts], on the device: for ``route``. epoch i64 [1], there: the token under way;
    inputs: what its graph fetches first. is_complete: whether some GPU holds every expert, for ever. is_open:
    whether the other ranks wait for tokens. timeout_s: how long the GPU waits for a rank in a layer.
    """

    def __init__(
        self,
        model: GpuModel,
        memory: RankMemory,
        residency: Residency,
        timeout_s: float,
        *,
        is_complete: bool,
    ) -> None:
        device, layers = model.device, memory.num_layers
        self.num_ranks, self.is_complete, self.is_open = memory.num_ranks, is_complete, False
        self._device, self._kernels, self._memory, self._residency = device, model.kernels, memory, residency
        self._layer_numbers = model.shape.expert_layers
        self._timeout_ns = int(timeout_s * 1e9)
        self.holders = device.empty((layers, model.shape.num_experts), torch.uint8)
        self._host_holders = device.pinned(self.holders.shape, torch.uint8)
        self.epoch = device.empty((1,), torch.int64)
        self._host_epoch = device.pinned((1,), torch.int64)
        self.inputs = ((self.epoch, self._host_epoch),)
        self._timeouts = device.pinned((1,), torch.int64)
        clear_words(device, self._host_epoch, self._timeouts)
        self._token = 0
        self._known: tuple[int, ...] = ()
        self._check: Callable[[], None] = _nothing
        memory.sent.ids.fill_(-1)  # in the run before the first capture

    # ---- the host ------------------------------------------------------------------------------------------

    def open(self, check: Callable[[], None]) -> None:
        """The others wait for tokens from here on. check: raises if the job has failed."""
        self._check, self.is_open = check, True

    def prepare(self, stream: Stream) -> None:
        """Before each token: waits until the others are ready, and for where the experts are then. Raises
        what ``check`` does if the job fails meanwhile."""
        token, memory = self._token + 1, self._memory
        for rank in range(1, self.num_ranks):
            while not memory.is_set(memory.ready(rank), token, PATIENCE_S):
                self._check()
        known = (self._residency.num_tables, *memory.versions.tolist())
        if known == self._known:
            return
        self._device.host_writes(self._host_holders)
        holders = self._host_holders.numpy()
        np.multiply(self._residency.host_addresses != 0, HERE, out=holders, casting="unsafe")
        for rank in range(1, self.num_ranks):
            np.copyto(holders, ELSEWHERE, where=memory.held[rank].numpy() != 0)
        stream.copy(self.holders, self._host_holders)
        self._known = known

    def begin(self, num_rows: int) -> None:
        """The others begin the token whose graph is submitted next."""
        self._token += 1
        self._device.host_writes(self._host_epoch)
        self._host_epoch[0] = self._token
        self._ring(num_rows)

    def end(self) -> int:
        """After a token, with the stream synchronised: how many slots the others computed. Raises NativeError
        if one did not answer, and what ``check`` does: a job that failed has set every flag."""
        self._check()
        self._device.host_reads(self._timeouts)
        tag = int(self._timeouts[0])
        if tag:
            layer, rank = divmod(tag - 1, self.num_ranks)
            raise NativeError(
                f"the GPU waited in vain for rank {rank}'s experts",
                where=f"layer {self._layer_numbers[layer]}",
                limit=f"{self._timeout_ns / 1e9:g} s",
            )
        return int(self._memory.executed[1:].sum())

    def close(self) -> None:
        """The others are free for other work; does nothing if they are."""
        if self.is_open:
            self.is_open = False
            self._token += 1
            self._ring(0)

    def release(self) -> None:
        """Ends all waits, of the GPUs of all ranks: the job has failed. From any thread."""
        self._memory.release()

    def _ring(self, num_rows: int) -> None:
        self._memory.num_rows[0] = num_rows
        self._memory.set_flag(self._memory.bell, self._token)

    # ---- launches, to be captured --------------------------------------------------------------------------

    def send(
        self, stream: Stream, layer: int, normed: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """To all other ranks: rows [T, hidden] f32, their experts and weights [T, top_k]."""
        sent, count = self._memory.sent, len(normed)
        pieces = ((sent.rows[:count], normed), (sent.ids[:count], ids), (sent.weights[:count], weights))
        self._kernels.send(stream, pieces, self._memory.sent_flag(layer), self.epoch)

    def receive(self, stream: Stream, layer: int, hidden: torch.Tensor) -> None:
        """hidden [T, hidden] f32 += the sums of the others, in the order of the ranks."""
        for rank in range(1, self.num_ranks):
            self._kernels.receive(
                stream,
                hidden,
                self._memory.results[rank, : len(hidden)],
                self._memory.result_flag(rank, layer),
                self.epoch,
                self._timeout_ns,
                self._timeouts,
                tag=layer * self.num_ranks + rank + 1,
            )


def clear_words(device: Device, *words: torch.Tensor) -> None:
    """Sets pinned words that nothing uses yet to 0."""
    device.host_writes(*words)
    for word in words:
        word.zero_()


def _nothing() -> None:
    """Before ``open``."""
