"""Which bytes a view covers, and the history of stretches, against one cell a byte."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from krasis.runtime.device.ordering import Access, Clock, History, byte_ranges


def covered(view: torch.Tensor, base: torch.Tensor) -> set[int]:
    """Byte by byte, by writing through the view."""
    base.zero_()
    view.copy_(torch.full_like(view, -1))
    touched = base.view(torch.uint8).flatten().nonzero().flatten()
    return set(touched.tolist())


VIEWS = {
    "whole": lambda t: t,
    "row": lambda t: t[1],
    "column": lambda t: t[:, 2],
    "block": lambda t: t[1:3, 2:4],
    "transposed": lambda t: t.transpose(0, 2),
    "last": lambda t: t[..., -1:],
    "steps": lambda t: t[::2, 1::3],
    "one": lambda t: t[2, 1, 1],
    "none": lambda t: t[:, 3:3],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_ranges_are_the_bytes_of_a_view(name: str, dtype: torch.dtype) -> None:
    base = torch.zeros((3, 5, 4), dtype=dtype)
    view = VIEWS[name](base)
    ranges = byte_ranges(view)
    found = {byte - base.data_ptr() for begin, end in ranges for byte in range(begin, end)}
    assert found == covered(view, base)
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))


def test_an_expanded_view_covers_its_bytes_once() -> None:
    base = torch.zeros(4, dtype=torch.int32)
    view = base[1:3, None].expand(2, 7)
    assert byte_ranges(view) == [(base.data_ptr() + 4, base.data_ptr() + 12)]


class Cells:
    """The history of each byte apart."""

    def __init__(self, num_bytes: int) -> None:
        self.writes: list[Access | None] = [None] * num_bytes
        self.reads: list[list[Access]] = [[] for _ in range(num_bytes)]

    def is_allowed(self, begin: int, end: int, clock: Clock, is_write: bool) -> bool:
        for byte in range(begin, end):
            write = self.writes[byte]
            if (write is None and not is_write) or (write is not None and not write.is_before(clock)):
                return False
            if is_write and not all(read.is_before(clock) for read in self.reads[byte]):
                return False
        return True

    def note(self, begin: int, end: int, access: Access, is_write: bool) -> None:
        for byte in range(begin, end):
            if is_write:
                self.writes[byte], self.reads[byte] = access, []
            else:
                self.reads[byte].append(access)


@pytest.mark.parametrize("seed", range(20))
def test_stretches_agree_with_bytes(seed: int) -> None:
    rng = random.Random(seed)
    history, cells = History(64), Cells(64)
    counts: Clock = {0: 0, 1: 0, 2: 0}
    num_conflicts = 0
    for _ in range(300):
        component = rng.randrange(3)
        counts[component] += 1
        # Everything of its own is known, of the others something.
        clock = {other: max(0, counts[other] - rng.choice((0, 0, 1, 5))) for other in counts}
        clock[component] = counts[component]
        begin = rng.randrange(64)
        end = rng.randint(begin + 1, 64)
        access, is_write = Access(component, counts[component], "access"), rng.random() < 0.5
        note = history.write if is_write else history.read
        conflict = note(begin, end, access, clock)
        assert (conflict is None) == cells.is_allowed(begin, end, clock, is_write)
        if conflict is None:
            cells.note(begin, end, access, is_write)
        else:
            num_conflicts += 1
            assert not cells.is_allowed(conflict.begin, conflict.end, clock, is_write)
    assert 20 < num_conflicts < 280


def test_stretches_merge_again() -> None:
    history, clock = History(4096), {1: 10**6}
    for offset in range(0, 4096, 2):
        history.write(offset, offset + 1, Access(1, offset + 1, "piece"), clock)
    assert history.num_stretches > 2000
    history.write(0, 4096, Access(1, 10**5, "whole"), clock)
    assert history.num_stretches == 1
    reader = Access(1, 10**5 + 1, "reader")
    for begin in (0, 1024, 2048, 3072):
        history.read(begin, begin + 1024, reader, clock)
    history.read(0, 4096, Access(1, 10**5 + 2, "reader"), clock)
    assert history.num_stretches == 1
