"""An exchange takes no memory once it has reached another rank, and none at all for keys and values: a rank
that has none left can still say what it made, and make the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.distributed import torch_parallel
from krasis.runtime.distributed.room import room_for, side_by_side, steps_within
from krasis.runtime.distributed.torch_parallel import TorchParallel
from krasis.runtime.gpu.parallel import KvPart
from krasis.runtime.gpu.partition import Partition

RANKS, TOKENS, HIDDEN, KV_HEADS, HEAD_DIM = 3, 7, 16, 2, 8


class Reached(TorchDispatchMode):
    """Notes the collective's calls, and what makes memory after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.made_before: list[str] = []
        self.made_after: list[str] = []

    def collective(self, *tensors: torch.Tensor) -> None:
        self.num_calls += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and one.numel()]
        if any(self._address(one) not in given for one in made):
            (self.made_after if self.num_calls else self.made_before).append(str(func))
        return result

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


class Alone:
    """A control of one process."""

    @staticmethod
    def raise_if_failed() -> None:
        pass


def parallel_of(rank: int) -> TorchParallel:
    parallel = object.__new__(TorchParallel)
    parallel.rank, parallel.num_ranks, parallel.partition = rank, RANKS, Partition(RANKS)
    parallel.first_expert, parallel.num_experts, parallel.num_exchanges = 2, 3, 0
    parallel._control = Alone()
    return parallel


@pytest.mark.parametrize("name", ["gather_tokens", "gather_ids", "scatter_sum", "share_kv", "send_kv"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_nothing_is_made_once_others_are_reached(monkeypatch, rank: int, name: str) -> None:
    seen, parallel, device = Reached(), parallel_of(rank), DeviceDouble()
    monkeypatch.setattr(torch_parallel, "_all_gather", seen.collective)
    for call in ("all_to_all_single", "broadcast"):
        monkeypatch.setattr(torch_parallel.dist, call, lambda *tensors: seen.collective())
    stream = device.stream("compute")
    rows = parallel.rows_per_rank(TOKENS)

    def filled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = device.empty(tuple(shape), dtype)
        stream.launch("fill", lambda _: tensor.zero_(), reads=[], writes=[tensor])
        return tensor

    ids, all_ids = filled((rows, 4), torch.int32), filled((rows * RANKS, 4), torch.int32)
    hidden = filled((rows, HIDDEN), torch.float32)
    sums, received = (filled((rows * RANKS, HIDDEN), torch.float16) for _ in range(2))
    kv = KvPart(*(filled((KV_HEADS, 20, HEAD_DIM), torch.float16) for _ in range(2)), 3, 3 + TOKENS)
    room = filled((2 * KV_HEADS * HEAD_DIM * 2 * rows * (RANKS + 1),), torch.uint8)
    calls = {
        "gather_tokens": lambda: parallel.gather_tokens(stream, ids, all_ids, TOKENS),
        "gather_ids": lambda: parallel.gather_ids(stream, ids, all_ids, TOKENS),
        "scatter_sum": lambda: parallel.scatter_sum(stream, sums, hidden, TOKENS, received),
        "share_kv": lambda: parallel.share_kv(stream, [kv], room),
        "send_kv": lambda: parallel.send_kv(stream, [kv], room[:40]),  # more than a position
    }
    with seen:
        calls[name]()
        stream.synchronize()
    assert seen.num_calls == (2 * TOKENS if name == "send_kv" else 1)
    assert seen.made_after == []
    if name != "gather_ids":
        assert seen.made_before == []


def test_room_is_the_scratchs_where_it_is_enough() -> None:
    scratch, like = torch.zeros((3, 5), dtype=torch.uint8), torch.zeros(1, dtype=torch.float16)
    inside = room_for((7, 1), like, scratch)
    inside.fill_(1.0)
    assert inside.dtype == torch.float16
    assert scratch.flatten()[:14].any()
    assert not scratch.flatten()[14:].any()
    for given in (scratch, None):
        made = room_for((8, 1), like, given)
        assert made.shape == (8, 1)
        assert made.untyped_storage().data_ptr() != scratch.untyped_storage().data_ptr()


@pytest.mark.parametrize("room_rows", [None, 0, 1, 2, 3, 100])
def test_steps_hold_every_position_once_in_order(room_rows: int | None) -> None:
    tensors = [torch.arange(6 * n).view(2, n, 3) for n in (4, 1, 5)]
    room_bytes = None if room_rows is None else room_rows * 2 * 3 * 8 + 5
    scratch = None if room_bytes is None else torch.zeros(room_bytes, dtype=torch.uint8)
    steps = steps_within(tensors, scratch)
    assert torch.equal(torch.cat([one for step in steps for one in step], 1), torch.cat(tensors, 1))
    most = max(side_by_side(step)[1] for step in steps)
    assert most == (min(10, room_rows) if room_rows else 10)
