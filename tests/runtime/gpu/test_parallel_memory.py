"""The memory that ranks share in decode: where things lie, and whose it is."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from itertools import pairwise

import pytest

from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu import parallel_memory
from krasis.runtime.gpu.parallel_memory import GIVE_UP, RankMemory
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.shape import shape_of

SECRET = 0x1234567890ABCDEF


@pytest.mark.parametrize(("num_ranks", "rows"), [(2, 1), (3, 8), (8, 5)])
def test_nothing_overlaps(num_ranks: int, rows: int) -> None:
    spec = shape("qwen3-30b-a3b")
    sizes = shape_of(replace(spec, layers=spec.layers[:3]))
    num_bytes = RankMemory.num_bytes(num_ranks, rows, sizes)
    assert num_bytes % 4096 == 0
    memory = RankMemory(DeviceDouble(), mmap.mmap(-1, num_bytes), num_ranks, rows, sizes)
    layers, ranks = range(memory.num_layers), range(num_ranks)
    flags = [memory.bell, *(memory.ready(rank) for rank in ranks), *(memory.sent_flag(one) for one in layers)]
    flags += [memory.result_flag(rank, layer) for rank in ranks for layer in layers]
    tensors = [*flags, memory.num_rows, memory.executed, memory.versions, memory.held, memory.results]
    tensors += [memory.sent.rows, memory.sent.ids, memory.sent.weights]
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    begins = [flag.data_ptr() for flag in flags]
    assert min(b - a for a, b in pairwise(sorted(begins))) >= 128, "flags share a line of a cache"


def test_release_ends_waits_of_gpus_and_leaves_the_hosts_words() -> None:
    spec = shape("qwen3-30b-a3b")
    sizes = shape_of(replace(spec, layers=spec.layers[:2]))
    memory = RankMemory(DeviceDouble(), mmap.mmap(-1, RankMemory.num_bytes(2, 1, sizes)), 2, 1, sizes)
    memory.set_flag(memory.bell, 7)
    assert memory.is_set(memory.bell, 7)
    assert not memory.is_set(memory.bell, 8, 0.001)
    memory.release()
    for flag in (memory.sent_flag(1), memory.result_flag(1, 0), memory.result_flag(1, 1)):
        assert int(flag[0]) == GIVE_UP
    assert int(memory.bell[0]) == 7
    assert int(memory.ready(1)[0]) == 0


@pytest.mark.parametrize(
    ("name", "secret", "size", "words"),
    [
        ("krasis-ranks", SECRET, 4096, None),
        ("krasis-ranks", SECRET + 1, 4096, "of another job"),
        ("krasis-ranks", SECRET, 8, "of another job"),
        ("someone", SECRET, 4096, "another file"),
    ],
)
def test_only_the_jobs_own_file_is_mapped(name: str, secret: int, size: int, words: str | None) -> None:
    """In another container a process of rank 0's number may be anybody's."""
    descriptor = os.memfd_create(name)
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, secret.to_bytes(8, "little"), 0)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        if words is None:
            with parallel_memory._map(path, 4096, SECRET) as memory:
                memory[100] = 7
            assert os.pread(descriptor, 1, 100) == b"\x07"
        else:
            with pytest.raises(ValueError, match=words):
                parallel_memory._map(path, 4096, SECRET)
    finally:
        os.close(descriptor)
