"""What server and engine say to each other arrives as it was said."""

from __future__ import annotations

import dataclasses
import math
import socket
import struct
from typing import Any

import pytest

from krasis.formats.errors import FormatError, KrasisError, NativeError, ResourceError, UsageError
from krasis.runtime.distributed.errors import RankError
from krasis.runtime.server.engine.channel import Channel
from krasis.runtime.server.engine.errors_told import heard, told
from krasis.runtime.server.engine.order import EngineOrder
from krasis.runtime.server.engine.records import (
    of_event,
    of_request,
    of_status,
    to_event,
    to_request,
    to_status,
)
from krasis.runtime.server.grammar import Grammar, MaskRecipe
from krasis.runtime.serving import api
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import EngineSettings, SamplingSettings


def sent(head: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """A message through a channel."""
    one, other = (Channel(end, "test") for end in socket.socketpair())
    one.send(head, data)
    found = other.receive()
    one.finish()
    assert other.receive() is None
    other.finish()
    assert found is not None
    return found


def recipe(grammar: Grammar, closes: tuple[str, ...]) -> MaskRecipe:
    return MaskRecipe(grammar, closes, None, None)  # type: ignore[arg-type]


def test_requests() -> None:
    request = api.Request(
        id="req \udcff 1",
        prompt=[0, 5, 2**31],
        sampling=SamplingSettings(temperature=0.7, seed=2**64 - 1, top_k=3),
        max_tokens=7,
        stops=("</s>", "\x00\ud800"),
        is_plain=True,
        split_thinking=False,
        ignore_ends=True,
        logprobs=2,
        sampled_logprobs=True,
        prompt_logprobs=0,
        logit_bias={3: -1e9, 4: 1.5},
        make_mask=recipe(Grammar("lark", 'start: "ä"', "tools"), ("</think>",)),
        priority=2,
        side=True,
        conversation="Grüße",
        use_cache=False,
        progress=False,
        slot=1,
    )
    for field in dataclasses.fields(request):  # a new field must be said, too
        assert getattr(request, field.name) != field.default, field.name
    head, data = of_request(request)
    found, prompt = sent({"request": head}, data)
    assert to_request(found["request"], prompt, recipe) == request
    plain = api.Request(id="x", prompt=[1])
    assert to_request(*of_request(plain), recipe) == plain
    with pytest.raises(NativeError, match="mask"):
        of_request(dataclasses.replace(plain, make_mask=lambda: None))  # type: ignore[arg-type, return-value]


SCORE = api.Score(3, -math.inf, 2, ((4, -0.25), (5, -1e-300)))
USAGE, TIMINGS = api.Usage(1, 2, 3, 4), api.Timings(0.5, 0.25, 0.125, 1e-9)


@pytest.mark.parametrize(
    "event",
    [
        api.Progress(1, 2, 3, 0.5),
        api.PromptScores((None, SCORE)),
        api.Delta((), ""),
        api.Delta((1,), "\ud83d é\x00", "reasoning", (SCORE,)),
        api.Finished("stop", USAGE, TIMINGS, "</s>"),
    ],
)
def test_events(event: api.Event) -> None:
    assert to_event(sent({"event": of_event(event)})[0]["event"]) == event


ERRORS = [
    UsageError("what", where="a.py", got=3, limit="4 to 5", hint="do"),
    FormatError("no\x1b[31m"),
    ResourceError("little memory", got=0),
    api.QueueFullError("full", retry_after_s=2.5, got=3, limit=2),
    api.ContextTooLongError(300, 200),
    api.CoreClosedError("closed"),
    api.EngineLostError("lost", retry_after_s=3),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda one: type(one).__name__)
def test_errors(error: KrasisError) -> None:
    event = to_event(sent({"event": of_event(api.Failed(error, USAGE, TIMINGS))})[0]["event"])
    assert isinstance(event, api.Failed)
    found = event.error
    assert (event.usage, event.timings) == (USAGE, TIMINGS)
    assert (type(found), str(found), found.exit_code) == (type(error), str(error), error.exit_code)
    for name in ("retry_after_s", "num_tokens", "context"):
        assert getattr(found, name, None) == getattr(error, name, None)


def test_errors_of_classes_that_the_other_side_does_not_know() -> None:
    found = heard(told(RankError("rank 1 ended")))
    assert (str(found), found.exit_code, found.is_final) == ("rank 1 ended", 8, True)
    fault = heard(told(ZeroDivisionError("x")))
    assert "fault of Krasis" in str(fault)
    assert fault.exit_code == 70
    assert heard(told(MemoryError())).exit_code == ResourceError.exit_code


def test_figures() -> None:
    counters = api.Counters(num_requests=3, pass_s=0.25, num_finished={"end": 2})
    status = api.CoreStatus(1, 2, (api.SlotStatus(0, 5, "x", True),), 0.5, 7, 8, counters, True)
    assert to_status(sent({"found": of_status(status)})[0]["found"]) == status


def test_orders(tmp_path: Any) -> None:
    order = EngineOrder(
        bundle=tmp_path,
        engine=EngineSettings(context=64, threads=2, template_vars={"enable_thinking": False}),
        core=CoreSettings(num_slots=3, max_waiting=5, cache_bytes=7, limits=Limits(pass_rows=8)),
        prefix_dir=tmp_path / "a",
        prefix_dir_bytes=9,
        slot_dir=tmp_path / "b",
        gpus=2,
        log_level=10,
        program="x",
    )
    found = EngineOrder.of_json(sent(order.to_json())[0])
    assert found == dataclasses.replace(order, core=found.core)
    assert found.core == dataclasses.replace(order.core, max_waiting=2**31 - 1)
    assert found.in_context(32).engine == dataclasses.replace(order.engine, context=32)


def test_long_messages_go_both_ways_at_once() -> None:
    one, other = (Channel(end, "test") for end in socket.socketpair())
    data = bytes(3 * 2**20)
    for channel in (one, other):  # more than any buffer holds: nobody waits for the other
        channel.send({"a": 1}, data)
        channel.send({"a": 2})
    for channel in (one, other):
        assert channel.receive() == ({"a": 1}, data)
        assert channel.receive() == ({"a": 2}, b"")
    one.abandon()
    other.send({"a": 3})  # lost
    assert other.receive() is None
    other.finish()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack(">QQ", 2**40, 0), "too long"),
        (struct.pack(">QQ", 2, 0) + b"[]", "no object"),
        (struct.pack(">QQ", 2, 0) + b"{]", "no JSON"),
        (struct.pack(">QQ", 2, 0) + b"\xff\xff", "no JSON"),
        (struct.pack(">QQ", 200_000, 0) + b"[" * 200_000, "no JSON"),
    ],
)
def test_what_is_no_message_is_told(data: bytes, words: str) -> None:
    end, rude = socket.socketpair()
    channel = Channel(end, "test")
    rude.sendall(data)
    rude.close()
    with pytest.raises(NativeError, match=words):
        channel.receive()
    channel.abandon()


CUT = (b"", bytes(7), struct.pack(">QQ", 5, 0) + b"{", struct.pack(">QQ", 2, 9) + b"{}")


@pytest.mark.parametrize("data", CUT)
def test_a_message_that_is_cut_off_is_the_end(data: bytes) -> None:
    end, rude = socket.socketpair()
    channel = Channel(end, "test")
    rude.sendall(data)
    rude.close()
    assert channel.receive() is None
    channel.abandon()


def test_that_the_other_side_has_gone_is_seen_past_what_it_said() -> None:
    one, other = (Channel(end, "test") for end in socket.socketpair())
    one.send({"a": 1})
    one.finish()
    other.wait_until_left()
    assert other.receive() == ({"a": 1}, b"")
    assert other.receive() is None
    other.abandon()
