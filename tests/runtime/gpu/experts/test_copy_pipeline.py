"""When copies are submitted: always two groups ahead of the products, across layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.experts.copy_pipeline import CopyPipeline
from krasis.runtime.gpu.experts.schedule import Group, copies, pass_groups
from krasis.runtime.host_memory import PinnedExperts

RECORD = 8


class Log:
    """What was submitted to all streams, in that order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.num_events = 0


class Stream:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)
        self.log.lines.append(f"copy {source[0, 0]}..{source[-1, 0]}")

    def record(self) -> int:
        self.log.num_events += 1
        return self.log.num_events

    def wait(self, event: int) -> None:
        self.log.lines.append(f"{self.name} waits")


class Store:
    """Experts whose bytes are their number, layer * 10 + expert; in parts of at most two."""

    def __init__(self) -> None:
        self.acquired, self.released = 0, 0

    def acquire(self, layer: int, first: int, count: int) -> PinnedExperts:
        self.acquired += 1
        numbers = torch.arange(layer * 10 + first, layer * 10 + first + count, dtype=torch.uint8)
        tensor = numbers[:, None].repeat(1, RECORD)
        return PinnedExperts(layer, first, count, tuple(tensor.split(2)))

    def release(self, piece: PinnedExperts, event: Any) -> None:
        self.released += 1


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def buffers() -> torch.Tensor:
    return torch.zeros((2, 3, RECORD), dtype=torch.uint8)


@pytest.fixture
def pipeline(log: Log, store: Store, buffers: torch.Tensor) -> CopyPipeline:
    return CopyPipeline(Stream(log, "copies"), store, buffers)  # type: ignore[arg-type]


def run(pipeline: CopyPipeline, log: Log, layers: tuple[tuple[Group, ...], ...]) -> None:
    compute: Any = Stream(log, "compute")
    pipeline.extend(copies(layers))
    for groups in layers:
        for group in groups:
            if group.runs:
                pipeline.wait_for(group, compute)
                held = [int(number) for number in pipeline.memory_of(group)[:, 0]]
                expected = [
                    group.layer * 10 + run.first + index for run in group.runs for index in range(run.count)
                ]
                assert held == expected
            log.lines.append(f"product {group.layer}.{group.begin}")
            if group.runs:
                pipeline.release(group, compute)


def test_a_pass_line_by_line(pipeline: CopyPipeline, log: Log) -> None:
    copied = np.ones((2, 5), bool)
    copied[0, 1] = False
    run(pipeline, log, pass_groups(0, 5, copied, 3))
    assert log.lines == [
        "copy 0..0", "copy 2..2",  # group 0: experts 0 and 2 of layer 0
        "copy 3..4",  # group 1
        "compute waits", "product 0.0", "copies waits", "copy 10..11", "copy 12..12",  # group 2, of layer 1
        "compute waits", "product 0.3", "copies waits", "copy 13..14",
        "compute waits", "product 1.0",
        "compute waits", "product 1.3",
    ]  # fmt: skip


def test_two_groups_are_always_ahead(pipeline: CopyPipeline, log: Log, store: Store) -> None:
    layers = pass_groups(0, 9, np.ones((4, 9), bool), 3)
    run(pipeline, log, layers)
    copy_lines = [
        index
        for index, line in enumerate(log.lines)
        if line.startswith("copy") and not int(line[5:].split(".")[0]) % 10 % 3
    ]
    product_lines = [index for index, line in enumerate(log.lines) if line.startswith("product")]
    for number, product in enumerate(product_lines):
        ahead = sum(line < product for line in copy_lines) - number
        assert ahead == min(2, len(product_lines) - number)
    assert store.acquired == store.released == 12
    assert (pipeline.num_copies, pipeline.num_bytes) == (12, 4 * 9 * RECORD)
    pipeline.finish()
    run(pipeline, log, layers)  # another pass
    pipeline.finish()


def test_what_was_copied_must_be_used(pipeline: CopyPipeline, log: Log) -> None:
    (groups,) = pass_groups(0, 6, np.ones((1, 6), bool), 3)
    compute: Any = Stream(log, "compute")
    pipeline.extend(groups)
    with pytest.raises(NativeError, match="unused"):
        pipeline.finish()
    pipeline.wait_for(groups[0], compute)
    with pytest.raises(NativeError, match="out of turn"):
        pipeline.wait_for(groups[0], compute)
    pipeline.abort()
    pipeline.finish()
    run(pipeline, log, (groups,))
