"""``Parallel`` through torch.distributed: NCCL between GPUs, Gloo between CPU processes.

Only collectives of equal parts that both offer are used, on raw rows: all-gather, all-to-all, broadcast. The
sum over ranks is ours (all-to-all, then f32 additions in the order of the ranks), so it does not depend on
the transport.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Stream
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.room import room_for, side_by_side, steps_within
from krasis.runtime.distributed.store import prefixed
from krasis.runtime.gpu.parallel import KvPart
from krasis.runtime.gpu.partition import Partition, Segment

# Ranks wait in a collective for the slowest; death is noticed otherwise (``watch``), so this may be long.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_Rows = tuple[int, tuple[torch.Tensor, torch.Tensor]]
SUM_BYTES = 4 << 20  # of hidden rows summed at once, so that they stay in the L2 cache meanwhile


def join_group(place: Place, device: torch.device) -> None:
    """Makes torch.distributed's default group: NCCL for a CUDA device, Gloo otherwise. Blocks until all
    have."""
    nccl = device.type == "cuda"
    if nccl:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if nccl else "gloo",
        store=cast("Any", prefixed("group", place.connect())),
        rank=place.rank,
        world_size=place.num_ranks,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if nccl else None,
    )


def abort_group() -> None:
    """Frees threads and GPUs that wait in a collective. Gloo's wait ends when a peer's process does."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


def leave_group(failed: bool) -> None:
    """The end of ``join_group``; does nothing if that was never called."""
    if not dist.is_initialized():
        return
    if failed:
        abort_group()
    if dist.is_initialized():
        dist.destroy_process_group()


class TorchParallel:
    """See ``parallel.Parallel``. Needs ``join_group``. Raises UsageError for more ranks than experts."""

    def __init__(self, place: Place, control: Control, num_experts: int) -> None:
        self.rank, self.num_ranks = place.rank, place.num_ranks
        self.num_local_ranks = place.num_local_ranks
        self.partition = Partition(place.num_ranks)
        self.first_expert, self.num_experts = self.partition.experts(num_experts, self.rank)
        self.num_exchanges = 0
        self._control = control

    def own_segments(self, lengths: Sequence[int]) -> tuple[Segment, ...]:
        """See ``Parallel``."""
        return self.partition.segments(lengths, self.rank)

    def own_tokens(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return self.partition.own_tokens(num_tokens, self.rank)

    def rows_per_rank(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return self.partition.rows_per_rank(num_tokens)

    def gathered_rows(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return self.partition.gathered_rows(num_tokens)

    def gather_tokens(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """See ``Parallel``."""
        self._gather(stream, "gather_tokens", local, full, num_tokens, padding=0)

    def gather_ids(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """See ``Parallel``."""
        first, end = self.first_expert, self.first_expert + self.num_experts
        self._gather(stream, "gather_ids", local, full, num_tokens, padding=-1, kept=(first, end))

    def _gather(
        self,
        stream: Stream,
        name: str,
        local: torch.Tensor,
        full: torch.Tensor,
        num_tokens: int,
        *,
        padding: int,
        kept: Segment | None = None,
    ) -> None:
        """kept: [first, end) of the values that stay, others become the padding."""
        own, columns = self.own_tokens(num_tokens), local.shape[1]
        _check_rows(name, local, self.rows_per_rank(num_tokens), columns, local.dtype)
        _check_rows(name, full, self.gathered_rows(num_tokens), columns, local.dtype)

        def action(_: int) -> None:
            self._control.raise_if_failed()
            local[own:].fill_(padding)
            # Taken before: a rank that finds no memory for them has not been in the exchange.
            masks = [torch.empty_like(full, dtype=torch.bool) for _ in kept or ()]
            _all_gather(full, local)
            if kept is not None:
                below, above = masks
                torch.lt(full, kept[0], out=below)
                torch.ge(full, kept[1], out=above)
                full.masked_fill_(below.logical_or_(above), padding)

        # The padding row is written before it is read; naming it as read too would say that somebody else
        # wrote it.
        stream.launch(name, action, reads=_some(local[:own]), writes=_some(full, local[own:]))
        self.num_exchanges += 1

    def scatter_sum(
        self,
        stream: Stream,
        partial: torch.Tensor,
        hidden: torch.Tensor,
        num_tokens: int,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """See ``Parallel``."""
        own, rows, columns = self.own_tokens(num_tokens), self.rows_per_rank(num_tokens), hidden.shape[1]
        _check_rows("scatter_sum", hidden, rows, columns, torch.float32)
        _check_rows("scatter_sum", partial, rows * self.num_ranks, columns, partial.dtype)
        if scratch is not None:
            _check_rows("scatter_sum", scratch, rows * self.num_ranks, columns, partial.dtype)

        def action(_: int) -> None:
            self._control.raise_if_failed()
            received = torch.empty_like(partial) if scratch is None else scratch
            dist.all_to_all_single(received, partial)
            _add_parts(hidden[:own], received.view(self.num_ranks, rows, columns))
            hidden[own:].zero_()

        written = [hidden] if scratch is None else [hidden, scratch]
        stream.launch("scatter_sum", action, reads=_some(partial, hidden[:own]), writes=written)
        self.num_exchanges += 1

    def share_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """See ``Parallel``."""
        lengths = [part.num_tokens for part in parts]
        rows = self.rows_per_rank(sum(lengths))
        mine = range(self.rank * rows, (self.rank + 1) * rows)
        own: list[_Rows] = []
        others: list[_Rows] = []
        for row, block in _rows_of(parts, self.partition.blocks(lengths)):
            (own if row in mine else others).append((row, block))
        cache = parts[0].keys
        kv_heads, _, head_dim = cache.shape

        def action(_: int) -> None:
            self._control.raise_if_failed()
            room = room_for((rows * (self.num_ranks + 1), 2, kv_heads, head_dim), cache, scratch)
            packed, gathered = room[:rows], room[rows:]
            end = 0
            for row, block in own:
                begin, end = row - mine.start, row - mine.start + block[0].shape[1]
                for index, tensor in enumerate(block):
                    packed[begin:end, index] = tensor.transpose(0, 1)
            packed[end:].zero_()
            _all_gather(gathered, packed)
            for row, block in others:
                for index, tensor in enumerate(block):
                    tensor.copy_(gathered[row : row + tensor.shape[1], index].transpose(0, 1))

        written = [tensor for _, block in others for tensor in block]
        stream.launch(
            "share_kv",
            action,
            reads=[tensor for _, block in own for tensor in block],
            writes=written if scratch is None else [*written, scratch],
        )
        self.num_exchanges += 1

    def send_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """See ``Parallel``."""
        sent = [tensor for part in parts for tensor in part.rows(0, part.num_tokens)]
        steps = steps_within(sent, scratch)

        def action(_: int) -> None:
            self._control.raise_if_failed()
            for step in steps:
                packed = room_for(side_by_side(step), step[0], scratch)
                if self.rank == 0:
                    torch.cat(step, 1, out=packed)
                dist.broadcast(packed, 0)
                end = 0
                for tensor in step if self.rank else ():
                    begin, end = end, end + tensor.shape[1]
                    tensor.copy_(packed[:, begin:end])

        first, room = self.rank == 0, [] if scratch is None else [scratch]
        stream.launch(
            "send_kv", action, reads=sent if first else [], writes=room if first else [*sent, *room]
        )
        self.num_exchanges += 1

    def restore_order(
        self, stream: Stream, gathered: torch.Tensor, ordered: torch.Tensor, lengths: Sequence[int]
    ) -> None:
        """See ``Parallel``."""
        columns, num_tokens = gathered.shape[1], sum(lengths)
        _check_rows("restore_order", gathered, self.gathered_rows(num_tokens), columns, gathered.dtype)
        _check_rows("restore_order", ordered, num_tokens, columns, gathered.dtype)
        blocks = self.partition.blocks(lengths)

        def action(_: int) -> None:
            for begin, end, row in blocks:
                ordered[begin:end] = gathered[row : row + end - begin]

        stream.launch("restore_order", action, reads=[gathered], writes=[ordered])

    def agree(self, value: int) -> int:
        """See ``Parallel``."""
        return self._control.agree(value)


def _all_gather(full: torch.Tensor, local: torch.Tensor) -> None:
    """full = all ranks' local, in their order. torch 2.13 renamed the function and warns about the old
    name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    cast("Callable[[torch.Tensor, torch.Tensor], object]", gather)(full, local)


def _rows_of(parts: Sequence[KvPart], blocks: Sequence[tuple[int, int, int]]) -> list[_Rows]:
    """(first gathered row, keys and values) of each block of tokens; a block lies in one part."""
    begins = [sum(part.num_tokens for part in parts[:index]) for index in range(len(parts))]
    found = []
    for begin, end, row in blocks:
        index = bisect_right(begins, begin) - 1
        found.append((row, parts[index].rows(begin - begins[index], end - begins[index])))
    return found


def _add_parts(hidden: torch.Tensor, parts: torch.Tensor) -> None:
    """hidden [own, k] f32 += parts [R, P, k], rank after rank, a few rows at a time."""
    step = max(1, SUM_BYTES // (4 * hidden.shape[1]))
    for begin in range(0, len(hidden), step):
        rows = hidden[begin : begin + step]
        for part in parts:
            rows.add_(part[begin : begin + len(rows)])


def _some(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that are not empty."""
    return [tensor for tensor in tensors if tensor.numel()]


def _check_rows(where: str, tensor: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != (rows, columns) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise NativeError(
            "rows of another shape or type",
            where=where,
            got=f"{tuple(tensor.shape)} {tensor.dtype}{'' if tensor.is_contiguous() else ', not contiguous'}",
            limit=f"{(rows, columns)} {dtype}, contiguous",
        )
