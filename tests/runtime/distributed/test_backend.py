"""What rank 0 tells the others: which keys and values they lack, and what it computes alone."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from krasis.runtime.distributed.backend import DistributedBackend

LAYERS = 2


class FakeInner:
    """Notes calls."""

    def __init__(self, *, decodes_alone: bool = True, alone_up_to: int = 0, interrupt: bool = False) -> None:
        self.capacity, self.prefill_chunk, self.kv_dtype = 100, 50, "f16"
        self.description, self.placement = "fake", ("GPU", "CPU")
        self.spec = None
        self.decodes_alone = decodes_alone
        self.compute_stream = SimpleNamespace(synchronize=lambda: None)
        self.calls: list[tuple[Any, ...]] = []
        self._alone_up_to, self._interrupt = alone_up_to, interrupt

    def prefers_alone(self, num_tokens: int, start: int) -> bool:
        return num_tokens <= self._alone_up_to

    def prefill(self, tokens, start: int, want_all: bool, alone: bool = False) -> np.ndarray:
        if self._interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        self.calls.append(("prefill", tokens.tolist(), start, want_all, alone))
        return np.zeros((1, 4), np.float32)

    def decode(self, token: int, position: int) -> np.ndarray:
        self.calls.append(("decode", token, position))
        return np.zeros(4, np.float32)

    def import_kv(self, layer: int, keys, values) -> None:
        self.calls.append(("import", layer))

    def kv_layers(self):
        return [(f"keys {layer}", f"values {layer}") for layer in range(LAYERS)]


class FakeJob:
    """A Parallel and a Control that note what is sent."""

    def __init__(self) -> None:
        self.num_ranks, self.failure = 3, None
        self.sent: list[tuple[int, int]] = []
        self.commands: list[dict[str, Any]] = []

    def send_kv(self, stream, keys, values, begin: int, end: int) -> None:
        self.sent.append((begin, end))

    def send(self, name: str, **arguments: Any) -> None:
        self.commands.append({"name": name, **arguments})

    @contextmanager
    def joint(self, what: str):
        yield


def make(**options: Any) -> tuple[DistributedBackend, FakeInner, FakeJob]:
    inner, job = FakeInner(**options), FakeJob()
    return DistributedBackend(inner, job, job, lambda: job.commands.append({"name": "closed"})), inner, job


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def test_a_first_prompt_sends_no_keys() -> None:
    backend, inner, job = make()
    backend.prefill(tokens(5), 0, True)
    assert job.commands == [
        {"name": "prefill", "tokens": [0, 1, 2, 3, 4], "start": 0, "want_all": True, "shared": 0}
    ]
    assert job.sent == []
    assert inner.calls == [("prefill", [0, 1, 2, 3, 4], 0, True, False)]


def test_decoded_positions_are_sent_before_the_next_prompt() -> None:
    backend, _, job = make()
    backend.prefill(tokens(5), 0, False)
    for position in (5, 6, 7):
        backend.decode(1, position)
    backend.prefill(tokens(2), 8, False)
    assert job.commands[-1]["shared"] == 5
    assert job.sent == [(5, 8)] * LAYERS
    backend.prefill(tokens(2), 10, False)
    assert job.commands[-1]["shared"] == 10


def test_what_was_decoded_over_an_old_position_is_sent_again() -> None:
    """A truncated conversation: positions that all ranks had are rank 0's alone again."""
    backend, _, job = make()
    backend.prefill(tokens(20), 0, False)
    backend.decode(1, 10)
    backend.prefill(tokens(2), 12, False)
    assert job.commands[-1]["shared"] == 10


def test_an_edited_turn_sends_nothing() -> None:
    backend, _, job = make()
    backend.prefill(tokens(20), 0, False)
    backend.prefill(tokens(2), 7, False)
    assert job.sent == []
    assert job.commands[-1]["shared"] == 7
    backend.prefill(tokens(2), 9, False)
    assert job.sent == []


def test_a_short_prompt_is_rank_0s_alone_and_sent_later() -> None:
    backend, inner, job = make(alone_up_to=3)
    backend.prefill(tokens(3), 0, False)
    assert job.commands == []
    assert inner.calls == [("prefill", [0, 1, 2], 0, False, True)]
    backend.prefill(tokens(4), 3, False)
    assert job.commands[-1]["shared"] == 0
    assert job.sent == [(0, 3)] * LAYERS


def test_loaded_keys_are_sent() -> None:
    backend, _, job = make()
    backend.prefill(tokens(20), 0, False)
    backend.import_kv(0, None, None)
    backend.prefill(tokens(2), 6, False)
    assert job.sent == [(0, 6)] * LAYERS


def test_a_callbacks_error_waits_until_all_ranks_have_ended_the_pass() -> None:
    """A cancelled prompt, say: leaving the pass at once would leave the other ranks in it."""
    backend, inner, job = make()
    told: list[int] = []

    def fail(done: int, num_layers: int) -> None:
        told.append(done)
        raise ValueError(done)

    prefill = inner.prefill

    def two_layers(*arguments: Any) -> np.ndarray:
        inner.layer_done(1, 2)
        inner.layer_done(2, 2)
        return prefill(*arguments)

    inner.prefill = two_layers
    backend.layer_done = fail
    assert backend.layer_done is fail
    with pytest.raises(ValueError, match="1"):
        backend.prefill(tokens(5), 0, False)
    assert told == [1]
    assert len(inner.calls) == 1
    backend.layer_done = None
    assert inner.layer_done is None
    inner.prefill = prefill
    backend.prefill(tokens(2), 3, False)
    assert job.sent == []  # positions up to 5 are known to all


def test_decode_without_cpu_experts_is_a_prefill_on_all_ranks() -> None:
    backend, inner, job = make(decodes_alone=False)
    backend.prefill(tokens(5), 0, False)
    assert backend.decode(9, 5).shape == (4,)
    assert job.commands[-1] == {"name": "prefill", "tokens": [9], "start": 5, "want_all": False, "shared": 5}
    assert inner.calls[-1] == ("prefill", [9], 5, False, False)


def test_ctrl_c_waits_for_the_pass() -> None:
    backend, inner, job = make(interrupt=True)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        backend.prefill(tokens(5), 0, False)
    assert len(inner.calls) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert job.commands[-1]["shared"] == 0


def test_close_tells_the_others_once() -> None:
    backend, _, job = make()
    backend.close()
    backend.close()
    assert [command["name"] for command in job.commands] == ["close", "closed"]


def test_close_after_a_failure_tells_nobody() -> None:
    backend, _, job = make()
    job.failure = "rank 2 died"
    backend.close()
    assert [command["name"] for command in job.commands] == ["closed"]
