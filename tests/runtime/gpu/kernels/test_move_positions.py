"""Copies of a sequence's keys and values, of which only the device knows the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.kernels.attention_rows import CacheRows
from krasis.runtime.gpu.kernels.move_positions import Moved

HEADS, CAPACITY, KEY_BYTES, VALUE_BYTES = 2, 20, 32, 16
SIDES = (KEY_BYTES, VALUE_BYTES)
ENDS = [HEADS * CAPACITY * (size + 4) for size in SIDES]  # codes, then scales


def parts(memory: torch.Tensor) -> list[torch.Tensor]:
    """Codes and scales of keys and of values, uint8 [heads, capacity, bytes], in a slot's memory."""
    found, begin = [], 0
    for size, end in zip(SIDES, ENDS, strict=True):
        cells = HEADS * CAPACITY * size
        found.append(memory[begin : begin + cells].view(HEADS, CAPACITY, size))
        found.append(memory[begin + cells : begin + end].view(HEADS, CAPACITY, 4))
        begin += end
    return found


def place(bench: Any, memory: torch.Tensor, position: int) -> CacheRows:
    table = bench.put(torch.tensor([[position, memory.data_ptr(), memory.data_ptr()]]))
    return CacheRows(table, (memory,), 0, ENDS[0], CAPACITY, has_scales=True)


@pytest.mark.parametrize(
    ("position", "window", "part", "num_parts", "expected"),
    [
        (13, None, 0, 1, range(13)),
        (13, None, 1, 3, range(4, 8)),
        (13, None, 2, 3, range(8, 13)),
        (13, 8, 0, 1, range(6, 13)),  # with the position itself a window of 8
        (5, 8, 0, 1, range(5)),
        (19, 8, 1, 2, range(15, 19)),
        (13, None, 0, 0, range(13, 14)),
        (0, None, 0, 1, range(0)),
        (-1, None, 0, 0, range(0)),
    ],
)
def test_what_is_copied(
    bench: Any, position: int, window: int | None, part: int, num_parts: int, expected: range
) -> None:
    source, before = torch.arange(sum(ENDS)).to(torch.uint8), torch.zeros(sum(ENDS), dtype=torch.uint8)
    own, to = bench.put(source), bench.put(before)
    moved = Moved(HEADS, KEY_BYTES, VALUE_BYTES, window)
    bench.kernels.move_positions(
        bench.stream, moved, place(bench, own, position), place(bench, to, 0), part, num_parts
    )
    found = bench.get(to)
    for now, was, given in zip(parts(found), parts(before), parts(source), strict=True):
        wanted = was.clone()
        wanted[:, expected.start : expected.stop] = given[:, expected.start : expected.stop]
        assert torch.equal(now, wanted)


@pytest.mark.parametrize(
    ("moved", "num_parts"), [(Moved(HEADS, 24, 16), 1), (Moved(0, 32, 16), 1), (Moved(2, 32, 16), -1)]
)
def test_what_is_refused(bench: Any, moved: Moved, num_parts: int) -> None:
    memory = bench.put(torch.zeros(sum(ENDS), dtype=torch.uint8))
    places = place(bench, memory, 3), place(bench, memory, 0)

    def move() -> None:
        bench.kernels.move_positions(bench.stream, moved, *places, 0, num_parts)
        bench.get(memory)

    with pytest.raises(NativeError):
        move()
