"""Pinned memory that the ranks of rank 0's host share, through which their GPUs hand each other a token.

Rank 0 makes an anonymous file (memfd: nothing is left behind, whatever ends the processes) and the others map
it through its /proc. Who writes what:

- rank 0's GPU: ``sent``, then flag ``sent_flag(layer)``; rank r's GPU: ``results[r]`` (with the last layer
  ``executed[r]``), then flag ``result_flag(r, layer)``. Flags hold the number of a token, and only grow.
- rank 0's host: how many rows the token has, then ``bell``, the token's number; no rows: there are no more
  tokens for now. Rank r's host: which experts it holds, then ``ready(r)``, the token it is ready for.

Why one buffer each way does: rank 0 sends layer l + 1 only after it has received layer l from every rank,
which all of them have answered after they took it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
from math import prod
from pathlib import Path

import torch

from krasis.runtime.cpu.native import prototype
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.kernels.rank_rows import RoutedRows
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.planning.shape import ModelShape

logger = logging.getLogger(__name__)

FLAG_WORDS = 16  # 128 bytes: no two flags in one line of either side's cache
GIVE_UP = 2**63 - 1  # a token that never comes: every wait is over
_NAME = "krasis-ranks"
_UNKNOWN = 2**63 - 1
_ALIGNMENT_BYTES = 256


class RankMemory:
    """Views of the memory. num_ranks: that share it. normed f32 [rows, hidden], ids i32, weights f32 [rows,
    top_k]; results f32 [ranks, rows, hidden]; executed i64 [ranks]: slots a rank's GPU computed of a token;
    held u8 [ranks, layers, experts] with versions i64 [ranks]: what a rank has in VRAM."""

    def __init__(self, device: Device, memory: mmap.mmap, num_ranks: int, rows: int, a: ModelShape) -> None:
        self.num_ranks, self.num_layers = num_ranks, a.num_expert_layers
        self._bytes, self._end = device.adopt(memory), 0
        self._flags = self._take((2 + num_ranks + (1 + num_ranks) * self.num_layers, FLAG_WORDS), torch.int64)
        self.num_rows = self._take((1,), torch.int64)
        self.executed = self._take((num_ranks,), torch.int64)
        self.versions = self._take((num_ranks,), torch.int64)
        self.held = self._take((num_ranks, self.num_layers, a.num_experts), torch.uint8)
        choices = (rows, a.num_experts_per_token)
        self.sent = RoutedRows(
            self._take((rows, a.hidden_size), torch.float32),
            self._take(choices, torch.int32),
            self._take(choices, torch.float32),
        )
        self.results = self._take((num_ranks, rows, a.hidden_size), torch.float32)
        self._store, self._wait = prototype("krasis_store_flag"), prototype("krasis_wait_flag")

    @staticmethod
    def num_bytes(num_ranks: int, rows: int, a: ModelShape) -> int:
        """Of the memory, in whole pages; more than enough."""
        flags = (2 + num_ranks + (1 + num_ranks) * a.num_expert_layers) * FLAG_WORDS * 8
        words = 8 + 16 * num_ranks + num_ranks * a.num_expert_layers * a.num_experts
        tensors = rows * (a.hidden_size * 4 * (1 + num_ranks) + a.num_experts_per_token * 8)
        return -(-(flags + words + tensors + 16 * _ALIGNMENT_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def bell(self) -> torch.Tensor:
        """i64 [1]: the token that rank 0 has begun."""
        return self._flags[0, :1]

    def ready(self, rank: int) -> torch.Tensor:
        """i64 [1]: the token that a rank is ready for."""
        return self._flags[1 + rank, :1]

    def sent_flag(self, layer: int) -> torch.Tensor:
        """i64 [1]: the token of which rank 0 has sent this layer."""
        return self._flags[2 + self.num_ranks + layer, :1]

    def result_flag(self, rank: int, layer: int) -> torch.Tensor:
        """i64 [1]: the token of which a rank has answered this layer."""
        return self._flags[2 + self.num_ranks + (1 + rank) * self.num_layers + layer, :1]

    def set_flag(self, flag: torch.Tensor, token: int) -> None:
        """After everything that the host wrote before."""
        self._store(flag.data_ptr(), ctypes.c_uint64(token))

    def is_set(self, flag: torch.Tensor, token: int, patience_s: float = 0.0) -> bool:
        """Whether a flag holds this token or a later one, or does so within patience_s, looking all the
        time."""
        status: int = self._wait(flag.data_ptr(), ctypes.c_uint64(token), int(patience_s * 1e9))
        return status == 0

    def release(self) -> None:
        """Ends every wait, on all ranks: the token is lost. From any thread."""
        for index in range(2 + self.num_ranks, len(self._flags)):
            self.set_flag(self._flags[index, :1], GIVE_UP)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        begin = -(-self._end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._end = begin + num_bytes
        return self._bytes[begin : self._end].view(dtype).view(shape)


def share_memory(parallel: Parallel, num_bytes: int) -> tuple[mmap.mmap, int] | None:
    """Zeroed memory shared by the ranks of rank 0's host, and their number; None on ranks of other hosts,
    where there is none to share it with, and, with a warning, where not all of them can map it. Every rank
    must call it."""
    num_local = parallel.agree(parallel.num_local_ranks if parallel.rank == 0 else _UNKNOWN)
    is_first = parallel.rank == 0
    descriptor = os.memfd_create(_NAME) if is_first else -1
    try:
        mine = (os.getpid(), descriptor, secrets.randbits(62)) if is_first else (_UNKNOWN,) * 3
        owner, number, secret = (parallel.agree(value) for value in mine)
        if is_first:
            os.ftruncate(descriptor, num_bytes)
            os.pwrite(descriptor, secret.to_bytes(8, "little"), 0)
        parallel.agree(0)  # written
        memory, error = None, ""
        if parallel.rank < num_local and num_local > 1:
            try:
                memory = _map(f"/proc/{owner}/fd/{number}", num_bytes, secret)
            except (OSError, ValueError) as failed:
                error = str(failed)
        if parallel.agree(int(not error)) == 0:
            logger.warning(
                "rank %d: the ranks of this host cannot share memory, so rank 0 decodes alone: %s",
                parallel.rank,
                error or "another rank could not map it",
            )
            memory = None
        if memory is not None and is_first:
            memory[:8] = bytes(8)
    finally:
        if is_first:
            os.close(descriptor)
    parallel.agree(0)  # the secret is gone
    return None if memory is None else (memory, num_local)


def _map(path: str, num_bytes: int, secret: int) -> mmap.mmap:
    """Raises OSError, and ValueError for a file that is not ours: a process of that number may be another
    one in this container."""
    if f"memfd:{_NAME}" not in str(Path(path).readlink()):
        raise ValueError(f"{path} is another file")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < num_bytes or os.pread(descriptor, 8, 0) != secret.to_bytes(
            8, "little"
        ):
            raise ValueError(f"{path} is of another job")
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
