"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.server.turn import End
from krasis.runtime.server.usage import timings
from krasis.runtime.serving.api import QueueFullError
from tests.support.scripted_core import wait_until

from .conftest import Serve, says

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": HELLO, **more}


def test_a_whole_answer_has_every_field(serve: Serve) -> None:
    found = serve(script=says("Good day.")).post(CHAT, ask()).json
    choice = found["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Good day.",
        "refusal": None,
        "annotations": [],
    }
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("stop", None, 0)
    assert (found["object"], found["model"]) == ("chat.completion", "any")
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 2
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert found["timings"]["prompt_ms"] == 500.0


def test_a_stream_begins_at_once_and_ends_in_order(serve: Serve) -> None:
    body = ask(stream=True, stream_options={"include_usage": True})
    reply = serve(script=says("Good day.")).post(CHAT, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    first, *middle, last, usage, done = reply.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(one["choices"][0]["delta"]["content"] for one in middle) == "Good day."
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert done == "[DONE]"
    assert {one["usage"] for one in (first, *middle, last)} == {None}
    assert len({one["id"] for one in (first, *middle, last, usage)}) == 1


def test_usage_is_not_there_unless_asked_for(serve: Serve) -> None:
    assert all("usage" not in one for one in serve().post(CHAT, ask(stream=True)).events[:-1])


def test_reasoning_comes_apart(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("Let me see.\n</think>\n\nYes."))
    body = ask(chat_template_kwargs={"enable_thinking": True})
    message = served.post(CHAT, body).json["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "Let me see.")
    deltas = [one["choices"][0]["delta"] for one in served.post(CHAT, {**body, "stream": True}).events[:-1]]
    assert "".join(one.get("reasoning_content", "") for one in deltas) == "Let me see."
    assert "".join(one.get("content") or "" for one in deltas) == "Yes."


def test_effort_none_switches_thinking_off(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template)
    served.post(CHAT, ask(reasoning_effort="high"))
    served.post(CHAT, ask(reasoning_effort="none"))
    on, off = (served.core.assets.tokenizer.decode(one.prompt) for one in served.core.requests)
    assert on.endswith("<think>\n")
    assert not off.endswith("<think>\n")


def test_what_was_computed_before_is_told(serve: Serve) -> None:
    served = serve(script=says("Yes."))
    served.post(CHAT, ask())
    more = [*HELLO, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"}]
    usage = served.post(CHAT, ask(messages=more)).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(served.core.prompts[0])


def test_sampling_of_the_bundle_is_the_default_and_fields_change_it(serve: Serve) -> None:
    served = serve()
    served.post(CHAT, ask())
    served.post(CHAT, ask(temperature=0, top_p=0.5, seed=-7, presence_penalty=1, top_k=-1, min_p=0.1))
    plain, chosen = (one.sampling for one in served.core.requests)
    assert (plain.temperature, plain.top_k, plain.top_p) == (0.6, 20, 0.95)
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p) == (0.0, 0, 0.5, 0.1)
    assert (chosen.presence_penalty, chosen.seed) == (1.0, 2**64 - 7)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer(serve: Serve, name: str) -> None:
    found = serve(script=says("one two three four")).post(CHAT, ask(**{name: 2})).json
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("length", 2)


def test_stop_texts_end_the_answer_and_are_not_shown(serve: Serve) -> None:
    found = serve(script=says("one two STOP three")).post(CHAT, ask(stop=["STOP", ""])).json
    assert found["choices"][0]["message"]["content"] == "one two "
    assert found["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_of_each_token(serve: Serve) -> None:
    served = serve(script=says("one two"))
    found = served.post(CHAT, ask(logprobs=True, top_logprobs=3)).json["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in found) == "one two"
    assert all(len(one["top_logprobs"]) == 3 and one["logprob"] == -0.5 for one in found)
    assert bytes(found[0]["bytes"]).decode() == found[0]["token"]
    events = served.post(CHAT, ask(logprobs=True, stream=True)).events[:-1]
    streamed = [one["choices"][0]["logprobs"]["content"] for one in events if one["choices"][0]["logprobs"]]
    assert "".join(score["token"] for one in streamed for score in one) == "one two"


def test_progress_rides_on_chunks_if_asked_for(serve: Serve) -> None:
    events = serve().post(CHAT, ask(stream=True, return_progress=True)).events
    found = [one["prompt_progress"] for one in events[:-1] if "prompt_progress" in one]
    assert found[-1]["processed"] == found[-1]["total"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({}, "messages"),
        (ask(messages=[{"role": "user"}], temperature="warm"), "temperature"),
        (ask(messages=[{"content": "no role"}]), "messages"),
        (ask(messages=["text"]), "messages"),
        (ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages"),
        (ask(n=129), "n"),
        (ask(n=2, best_of=3), "best_of"),
        (ask(n=0), "n"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(max_tokens=-5), "max_tokens"),
        (ask(max_tokens="many"), "max_tokens"),
        (ask(top_p=1.5), "top_p"),
        (ask(temperature=-1), "temperature"),
        (ask(temperature=True), "temperature"),
        (ask(stop=5), "stop"),
        (ask(stop=[1]), "stop"),
        (ask(stop=["x"] * 65), "stop"),
        (ask(logprobs=True, top_logprobs=21), "top_logprobs"),
        (ask(top_logprobs=2), "top_logprobs"),
        (ask(logit_bias={"99999999": 1}), "logit_bias"),
        (ask(logit_bias={"x": 1}), "logit_bias"),
        (ask(logit_bias=[[1]]), "logit_bias"),
        (ask(stream_options={"include_usage": True}), "stream_options"),
        (ask(stream="yes"), "stream"),
        (ask(model=5), "model"),
        (ask(tools=[{"type": "function"}]), "tools[0]"),
        (ask(tools={}), "tools"),
        (ask(tool_choice="required"), "tool_choice"),
        (ask(tool_choice="sometimes"), "tool_choice"),
        (ask(response_format={"type": "yaml"}), "response_format"),
        (ask(response_format={"type": "json_schema"}), "response_format"),
        (ask(chat_template_kwargs={"messages": []}), None),
        (ask(chat_template_kwargs=5), "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_first_byte(
    serve: Serve, body: Any, param: str | None
) -> None:
    served = serve()
    for stream in (False, True):
        sent = body if "stream" in body or "stream_options" in body else {**body, "stream": stream}
        reply = served.post(CHAT, sent)
        assert reply.status == 400, reply.text
        error = reply.json["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        if param is not None:
            assert error["param"] == param
    assert not served.core.requests


def test_a_prompt_beyond_the_context_is_refused_in_the_words_agents_know(serve: Serve) -> None:
    served = serve(context=32)
    for text in ("word " * 40, "word " * 4000):
        error = served.post(CHAT, ask(messages=[{"role": "user", "content": text}], stream=True))
        assert error.status == 400
        found = error.json["error"]
        assert found["code"] == "context_length_exceeded"
        assert "maximum context length is 32 tokens" in found["message"]
        assert "exceeds the available context size" in found["message"]
        assert found["n_ctx"] == 32
        assert found["n_prompt_tokens"] >= 32


def test_a_full_queue_says_when_to_come_again(serve: Serve) -> None:
    served = serve(refusal=QueueFullError("the queue is full", retry_after_s=900))
    reply = served.post(CHAT, ask())
    assert (reply.status, reply.headers["retry-after"]) == (429, "120")
    assert reply.json["error"]["type"] == "rate_limit_error"


def test_an_error_in_the_middle_is_an_event(serve: Serve) -> None:
    served = serve(script=lambda _: NativeError("the kernel refused"))
    events = served.post(CHAT, ask(stream=True)).events
    assert "the kernel refused" in events[-2]["error"]["message"]
    assert events[-1] == "[DONE]"
    assert served.post(CHAT, ask()).status == 500


def test_half_an_emoji_does_not_end_a_conversation(serve: Serve) -> None:
    body = b'{"messages": [{"role": "user", "content": "a \\ud83d b \\\\ud83d \\ud83d\\ude42"}]}'
    served = serve()
    assert served.post(CHAT, body).status == 200
    text = served.core.assets.tokenizer.decode(served.core.requests[0].prompt)
    assert "a \ufffd b \\ud83d \U0001f642" in text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"a":' * 5000,
        b"[" * 100000,
        b'{"a":1,"a":2}',
    ],
)
def test_a_body_that_is_no_object_is_refused(serve: Serve, body: bytes) -> None:
    assert serve().post(CHAT, body).status == 400


def test_a_body_that_is_too_large_is_refused(serve: Serve) -> None:
    served = serve(serving={"max_body_bytes": 1000})
    assert served.post(CHAT, ask(user="x" * 2000)).status == 413
    assert served.ask("POST", CHAT, b"{}", {"content-length": "5000"}).status == 413


def test_silence_is_filled_with_empty_deltas(serve: Serve) -> None:
    served = serve(prefill_s=0.4, serving={"ping_interval_s": 0.1})
    events = served.post(CHAT, ask(stream=True)).events
    empty = [
        one
        for one in events[:-1]
        if one["choices"][0]["delta"] == {} and not one["choices"][0]["finish_reason"]
    ]
    assert 2 <= len(empty) <= 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(serve: Serve, stream: bool) -> None:
    served = serve(script=says("word " * 200), token_s=0.02)
    leave_after = 3 if stream else 0
    served.run(served.ask_async("POST", CHAT, ask(stream=stream), leave_after=leave_after))
    assert wait_until(lambda: served.core.num_finished == {"cancelled": 1})
    assert served.service._num_open == 0


def test_closing_ends_streams_with_an_error(serve: Serve) -> None:
    served = serve(script=says("word " * 200), token_s=0.02)

    async def close_soon() -> Any:
        answer = asyncio.ensure_future(served.ask_async("POST", CHAT, ask(stream=True)))
        while not served.core.tickets:
            await asyncio.sleep(0.01)
        served.service.close()
        return await answer

    events = served.run(close_soon()).events
    assert events[-2]["error"]["code"] == "shutting_down"
    assert served.post(CHAT, ask()).status == 503


def test_too_many_requests_at_a_time(serve: Serve) -> None:
    served = serve(serving={"max_requests": 1}, prefill_s=0.3)

    async def two() -> list[int]:
        asked = [asyncio.ensure_future(served.ask_async("POST", CHAT, ask()))]
        await asyncio.sleep(0.1)
        asked.append(asyncio.ensure_future(served.ask_async("POST", CHAT, ask())))
        return [(await one).status for one in asked]

    assert served.run(two()) == [200, 429]


def test_a_failure_of_ours_is_told_without_its_insides(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    monkeypatch.setattr(served.service, "begin", lambda *_: 1 / 0)
    reply = served.post(CHAT, ask())
    assert reply.status == 500
    assert "division" not in reply.text


def test_the_rate_is_that_of_the_steps_after_the_first_token() -> None:
    def times(num_generated_tokens: int, decode_s: float) -> dict[str, Any]:
        return timings(End("length", None, 10, 4, num_generated_tokens, 0, 0.5, decode_s))

    found = times(5, 2.0)
    assert (found["predicted_per_second"], found["predicted_per_token_ms"]) == (2.0, 500.0)
    assert (found["prompt_n"], found["prompt_per_second"]) == (6, 12.0)
    for one in (times(1, 0.0), times(0, 0.0)):
        assert (one["predicted_per_second"], one["predicted_per_token_ms"]) == (0.0, 0.0)
