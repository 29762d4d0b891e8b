"""What rank 0 tells the others: which keys and values they lack, and what it computes alone."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError, OutOfDeviceMemoryError
from krasis.runtime.batch import Batch, WantedLogits, batch_of
from krasis.runtime.distributed.backend import DistributedBackend, serve
from krasis.runtime.distributed.control import Outcome
from krasis.runtime.gpu.state import GpuState

LAYERS, SLOTS = 2, 4


class FakeInner:
    """Notes calls. alone_up_to: the most tokens of a pass that rank 0 computes without the others."""

    def __init__(self, *, decodes: bool = True, alone_up_to: int = 0, interrupt: bool = False) -> None:
        self.capacity, self.prefill_chunk, self.kv_dtype = 100, 50, "f16"
        self.description, self.placement = "fake", ("GPU", "CPU")
        self.spec, self.layer_done, self.decode_ranks = None, None, None
        self.idle_memory = None
        self.compute_stream = SimpleNamespace(synchronize=lambda: None)
        cache = SimpleNamespace(num_slots=SLOTS, capacity=100, write=lambda *_: None)
        self.state = GpuState(cache, self.compute_stream, "f16")
        self.calls: list[tuple[Batch, bool]] = []
        self.shrunk: list[str] = []
        self.refused = 0  # passes of more tokens
        self._decodes, self._alone_up_to, self._interrupt = decodes, alone_up_to, interrupt

    def runs_alone(self, batch: Batch) -> bool:
        is_decode = len(batch.tokens) == len(batch.spans)
        return (is_decode and self._decodes) or len(batch.tokens) <= self._alone_up_to

    def run(self, batch: Batch, alone: bool = False) -> np.ndarray:
        if self._interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        self.state.begin(batch)
        if self.refused and len(batch.tokens) > self.refused:
            raise OutOfDeviceMemoryError("no memory for temporaries", where="attention")
        self.calls.append((batch, alone))
        self.state.advance(batch.spans)
        return np.zeros((batch.num_logits, 4), np.float32)

    def shrink(self, words: str) -> None:
        self.shrunk.append(words)
        self.prefill_chunk //= 2

    def state_layers(self, slot: int):
        return []

    def kv_layers(self, slot: int):
        return [(f"keys {slot} {layer}", f"values {slot} {layer}") for layer in range(LAYERS)]


class FakeJob:
    """A Parallel and a Control that note what is sent, and obey what is told."""

    def __init__(self, commands: list[str] | None = None) -> None:
        self.rank, self.num_ranks, self.failure = 0, 3, None
        self.sent: list[list[tuple[str, int, int]]] = []
        self.commands: list[dict[str, Any]] = []
        self.others_say: list[str] = []  # at the ends of joint works
        self._told = list(commands or [])

    def send_kv(self, stream, parts, scratch) -> None:
        self.sent.append([(part.keys, part.begin, part.end) for part in parts])

    def send(self, name: str, **arguments: Any) -> None:
        self.commands.append(json.loads(json.dumps({"name": name, **arguments})))

    def receive(self) -> dict[str, Any]:
        return json.loads(self._told.pop(0))

    @contextmanager
    def joint(self, what: str):
        outcome = Outcome()
        yield outcome
        outcome.all_ranks = [outcome.own, self.others_say.pop(0) if self.others_say else ""]


def make(**options: Any) -> tuple[DistributedBackend, FakeInner, FakeJob]:
    inner, job = FakeInner(**options), FakeJob()
    backend = DistributedBackend(inner, job, job, lambda: job.commands.append({"name": "closed"}))
    for _ in range(SLOTS):
        backend.state.open()
    return backend, inner, job


def run(
    backend: DistributedBackend, *parts: tuple[int, int, int], logits: WantedLogits = "last"
) -> np.ndarray:
    """(slot, start, number of tokens)."""
    return backend.run(batch_of([(slot, start, np.arange(count), logits) for slot, start, count in parts]))


def test_a_first_prompt_sends_no_keys() -> None:
    backend, inner, job = make()
    run(backend, (0, 0, 5), logits="all")
    assert job.commands == [
        {"name": "run", "tokens": [0, 1, 2, 3, 4], "spans": [[0, 0, 5, 0, "all"]], "shared": [0]}
    ]
    assert job.sent == []
    assert [alone for _, alone in inner.calls] == [False]


def test_decoded_positions_are_sent_before_the_next_prompt() -> None:
    backend, inner, job = make()
    run(backend, (0, 0, 5))
    for position in (5, 6, 7):
        run(backend, (0, position, 1))
    assert [alone for _, alone in inner.calls] == [False, True, True, True]
    run(backend, (0, 8, 2))
    assert job.commands[-1]["shared"] == [5]
    assert job.sent == [[(f"keys 0 {layer}", 5, 8)] for layer in range(LAYERS)]
    run(backend, (0, 10, 2))
    assert job.commands[-1]["shared"] == [10]
    assert len(job.sent) == LAYERS


def test_each_sequence_is_counted_for_itself() -> None:
    """Three prompts, tokens of two of them, then a turn of each and a new prompt: what is missing of the two
    is sent together, a layer at a time."""
    backend, _, job = make()
    run(backend, (0, 0, 5), (2, 0, 7), (1, 0, 6))
    run(backend, (0, 5, 1), (2, 7, 1))
    run(backend, (2, 8, 1))
    run(backend, (1, 6, 2), (0, 6, 2), (3, 0, 3), (2, 9, 2))
    assert job.commands[-1]["shared"] == [6, 5, 0, 7]
    assert job.sent == [[(f"keys 0 {layer}", 5, 6), (f"keys 2 {layer}", 7, 9)] for layer in range(LAYERS)]
    run(backend, (1, 8, 2), (0, 8, 2), (3, 3, 2), (2, 11, 2))
    assert job.commands[-1]["shared"] == [8, 8, 3, 11]


def test_a_slots_next_sequence_begins_with_nothing() -> None:
    backend, _, job = make()
    run(backend, (1, 0, 20), (2, 0, 20))
    backend.state.close(1)
    assert backend.state.open() == 1
    run(backend, (1, 0, 3), logits="none")
    assert job.commands[-1]["shared"] == [0]
    backend.state.rewind(2, 4)
    run(backend, (2, 4, 3))
    assert job.commands[-1]["shared"] == [4]
    assert job.sent == []


def test_other_ranks_obey_batches() -> None:
    """Whatever their slots held before."""
    backend, inner, job = make()
    run(backend, (0, 0, 5), (2, 0, 7))
    run(backend, (2, 7, 1))
    run(backend, (2, 8, 3), (1, 0, 2), logits="all")
    backend.close()
    told = [json.dumps(command) for command in job.commands]
    other, line = FakeInner(), FakeJob(told)
    serve(other, line, line)
    assert line.sent == job.sent != []
    joint = [batch for batch, alone in inner.calls if not alone]
    assert [batch.spans for batch, _ in other.calls] == [batch.spans for batch in joint]
    for (found, _), expected in zip(other.calls, joint, strict=True):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert other.state.length(2) == 11


def test_an_impossible_batch_is_rank_0s_error_alone() -> None:
    backend, _, job = make()
    with pytest.raises(NativeError, match="computed in order"):
        run(backend, (0, 0, 5), (1, 3, 2))
    assert job.commands == []
    run(backend, (0, 0, 5))
    assert len(job.commands) == 1


def test_what_was_decoded_over_an_old_position_is_sent_again() -> None:
    """A truncated conversation: positions that all ranks had are rank 0's alone again."""
    backend, _, job = make()
    run(backend, (0, 0, 20))
    run(backend, (0, 10, 1))
    run(backend, (0, 11, 1))
    run(backend, (0, 12, 2))
    assert job.commands[-1]["shared"] == [10]


def test_an_edited_turn_sends_nothing() -> None:
    backend, _, job = make()
    run(backend, (0, 0, 20))
    run(backend, (0, 7, 2))
    assert job.sent == []
    assert job.commands[-1]["shared"] == [7]
    run(backend, (0, 9, 2))
    assert job.sent == []


def test_a_short_prompt_is_rank_0s_alone_and_sent_later() -> None:
    backend, inner, job = make(alone_up_to=3)
    run(backend, (0, 0, 2), (1, 0, 1))
    assert job.commands == []
    assert [alone for _, alone in inner.calls] == [True]
    run(backend, (0, 2, 4), (1, 1, 4))
    assert job.commands[-1]["shared"] == [0, 0]
    assert job.sent == [[(f"keys 0 {layer}", 0, 2), (f"keys 1 {layer}", 0, 1)] for layer in range(LAYERS)]


def test_loaded_keys_are_sent() -> None:
    backend, _, job = make()
    run(backend, (0, 0, 20), (1, 0, 20))
    rows = np.zeros((1, 6, 4), np.float16)
    for layer in range(LAYERS):
        backend.state.import_(1, layer, rows, rows)
    run(backend, (0, 20, 1), (1, 6, 2))
    assert job.sent == [[(f"keys 1 {layer}", 0, 6)] for layer in range(LAYERS)]


def test_a_callbacks_error_waits_until_all_ranks_have_ended_the_pass() -> None:
    """A cancelled prompt, say: leaving the pass at once would leave the other ranks in it."""
    backend, inner, job = make()
    told: list[int] = []

    def fail(done: int, num_layers: int) -> None:
        told.append(done)
        raise ValueError(done)

    compute = inner.run

    def two_layers(*arguments: Any) -> np.ndarray:
        inner.layer_done(1, 2)
        inner.layer_done(2, 2)
        return compute(*arguments)

    inner.run = two_layers
    backend.layer_done = fail
    assert backend.layer_done is fail
    with pytest.raises(ValueError, match="1"):
        run(backend, (0, 0, 5), (1, 0, 3))
    assert told == [1]
    assert len(inner.calls) == 1
    backend.layer_done = None
    assert inner.layer_done is None
    inner.run = compute
    run(backend, (0, 3, 2))
    assert job.sent == []  # positions up to 5 are known to all


def test_other_sequences_tokens_between_the_layers_of_a_joint_pass() -> None:
    """Rank 0 decodes them and tells nobody; a prompt there is refused before anybody is told of it."""
    backend, inner, job = make()
    assert not backend.decodes_between_layers
    inner.decodes_between_layers = True
    assert backend.decodes_between_layers
    run(backend, (1, 0, 6))
    compute, told = inner.run, []

    def one_layer(batch: Batch, alone: bool = False) -> np.ndarray:
        if not alone:
            inner.layer_done(1, 2)
            inner.layer_done(2, 2)
        return compute(batch, alone=alone)

    def decode(done: int, num_layers: int) -> None:
        told.append(done)
        backend.layer_done = None
        with pytest.raises(NativeError, match="only other sequences"):
            run(backend, (1, 5 + done, 2))
        run(backend, (1, 5 + done, 1))
        backend.layer_done = decode

    inner.run, backend.layer_done = one_layer, decode
    run(backend, (0, 0, 60))  # two passes
    assert told == [1, 2, 1, 2]
    assert len(job.commands) == 3
    assert [alone for _, alone in inner.calls] == [False, True, True, False, True, True, False]
    inner.run, backend.layer_done = compute, None
    run(backend, (1, 7, 2))
    assert job.sent == [[(f"keys 1 {layer}", 6, 7)] for layer in range(LAYERS)]


def test_decode_without_cpu_experts_is_a_prefill_on_all_ranks() -> None:
    backend, inner, job = make(decodes=False)
    run(backend, (0, 0, 5), (1, 0, 4))
    assert run(backend, (0, 5, 1), (1, 4, 1)).shape == (2, 4)
    assert job.commands[-1]["spans"] == [[0, 0, 1, 5, "last"], [1, 1, 1, 4, "last"]]
    assert job.commands[-1]["shared"] == [5, 4]
    assert not inner.calls[-1][1]


def test_any_ranks_lack_of_memory_halves_the_batch_of_all() -> None:
    backend, inner, job = make()
    inner.refused = 20  # rank 0's own
    assert run(backend, (0, 0, 30), (1, 0, 5), logits="all").shape == (35, 4)
    assert inner.shrunk == ["rank 0: attention: no memory for temporaries"] * 2
    assert backend.prefill_chunk == 12
    assert [len(batch.tokens) for batch, _ in inner.calls] == [12, 12, 11]
    assert [command["shared"] for command in job.commands] == [[0, 0], [0], [0], [12], [24, 0]]
    assert [backend.state.length(slot) for slot in (0, 1)] == [30, 5]
    job.others_say = ["", "", "", "rank 2: no memory"]  # another's, at the fourth pass
    run(backend, (0, 30, 40))
    assert inner.shrunk[2:] == ["rank 2: no memory"]
    assert backend.prefill_chunk == 6
    starts = [(batch.spans[0].start, len(batch.tokens)) for batch, _ in inner.calls[3:]]
    assert starts == [(30, 12), (42, 12), (54, 12), (66, 4), (66, 4)]


def test_ctrl_c_waits_for_the_pass() -> None:
    backend, inner, job = make(interrupt=True)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(backend, (0, 0, 5), (1, 0, 3))
    assert len(inner.calls) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert job.commands[-1]["shared"] == [0, 0]


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
