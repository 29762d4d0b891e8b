"""When the other ranks are told to decode, and when they are free again."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.batch import batch_of
from krasis.runtime.distributed.joint_decode import JointDecode, follow_decode
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower

TOKEN = batch_of([(0, 5, np.arange(1), "last"), (1, 9, np.arange(1), "last")])
PROMPT = batch_of([(0, 5, np.arange(3), "last")])


class FakeLink(RankLink):
    def __init__(self, notes: list[Any]) -> None:
        self.is_open, self._notes = False, notes

    def open(self, check) -> None:
        self.is_open = True
        self._notes.append("open")

    def close(self) -> None:
        self._notes.append("close")
        self.is_open = False


class FakeFollower(RankFollower):
    def __init__(self, notes: list[Any]) -> None:
        self._notes = notes

    def follow(self, check) -> None:
        self._notes.append("follow")


class FakeControl:
    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.raise_if_failed = lambda: None

    def send(self, name: str) -> None:
        self.notes.append(f"send {name}")

    @contextmanager
    def working(self, what: str):
        self.notes.append(f"begin {what}")
        yield
        self.notes.append(f"end {what}")


def test_the_others_are_told_once_until_they_are_free() -> None:
    control = FakeControl()
    joint = JointDecode(SimpleNamespace(decode_ranks=FakeLink(control.notes)), control)
    for _ in range(2):
        with joint.token(TOKEN):
            control.notes.append("token")
    joint.end()
    with joint.token(TOKEN):
        control.notes.append("token")
    one = ["begin decode", "token", "end decode"]
    told = ["begin decode", "send decode", "open", "token", "end decode"]
    assert control.notes == [*told, *one, "close", *told]


def test_a_prompt_that_rank_0_computes_alone_needs_nobody() -> None:
    control = FakeControl()
    with JointDecode(SimpleNamespace(decode_ranks=FakeLink(control.notes)), control).token(PROMPT):
        pass
    assert control.notes == []


def test_an_error_is_raised_inside_of_the_joint_work() -> None:
    control = FakeControl()
    joint = JointDecode(SimpleNamespace(decode_ranks=FakeLink(control.notes)), control)
    with pytest.raises(NativeError), joint.token(TOKEN):
        raise NativeError("an expert was left out")
    assert control.notes == ["begin decode", "send decode", "open"]


@pytest.mark.parametrize("has_part", [True, False])
def test_ranks_of_other_hosts_take_no_part(has_part: bool) -> None:
    control = FakeControl()
    follower = FakeFollower(control.notes) if has_part else None
    follow_decode(SimpleNamespace(decode_ranks=follower), control)
    assert control.notes == (["begin decode", "follow", "end decode"] if has_part else [])
    alone = JointDecode(SimpleNamespace(decode_ranks=None), control)
    assert alone.who == "rank 0"
    with alone.token(TOKEN):
        alone.end()
