"""Several answers to one request."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from krasis.formats.errors import NativeError

from .conftest import Serve, says

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def numbered() -> Any:
    """A script: each answer has a number of its own."""
    numbers = count()
    return lambda _: f"Answer {next(numbers)}."


def test_each_answer_has_its_index_and_the_prompt_counts_once(serve: Serve) -> None:
    served = serve(script=numbered())
    one = served.post(CHAT, {"messages": HELLO}).json["usage"]
    found = served.post(CHAT, {"messages": HELLO, "n": 3}).json
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    texts = {choice["message"]["content"] for choice in found["choices"]}
    assert texts == {"Answer 1.", "Answer 2.", "Answer 3."}
    assert found["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == 3 * one["completion_tokens"]


def test_a_stream_tells_the_answers_apart(serve: Serve) -> None:
    body = {"messages": HELLO, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *events, usage, done = serve(script=numbered()).post(CHAT, body).events
    texts, ends = ["", ""], [0, 0]
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        ends[choice["index"]] += choice["finish_reason"] == "stop"
    assert (sorted(texts), ends, done) == (["Answer 0.", "Answer 1."], [1, 1], "[DONE]")
    assert usage["usage"]["completion_tokens"] > 4


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_seeds_differ_and_the_first_is_the_clients(serve: Serve, path: str) -> None:
    served = serve()
    served.post(path, {"messages": HELLO, "prompt": "Hello", "n": 3, "seed": 2**64 - 1})
    assert sorted(one.sampling.seed or 0 for one in served.core.requests) == [0, 1, 2**64 - 1]
    served.post(path, {"messages": HELLO, "prompt": "Hello", "n": 2})
    assert [one.sampling.seed for one in served.core.requests[3:]] == [None, None]


def test_completions_of_several_prompts(serve: Serve) -> None:
    served = serve(script=lambda request: f"Of {len(request.prompt)}.")
    body: dict[str, Any] = {"prompt": ["Hello", "Hello, how are you?"], "n": 2, "max_tokens": 40}
    found = served.post(TEXT, body).json
    texts = [choice["text"] for choice in found["choices"]]
    lengths = [int(text.split()[1][:-1]) for text in texts]
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3]
    assert found["usage"]["prompt_tokens"] == lengths[0] + lengths[2]
    streamed = [""] * 4
    for event in served.post(TEXT, {**body, "stream": True}).events[:-1]:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_error_of_one_answer_ends_all(serve: Serve, path: str, stream: bool) -> None:
    numbers = count()
    served = serve(
        script=lambda _: NativeError("it broke") if next(numbers) == 1 else "word " * 500, token_s=0.01
    )
    reply = served.post(path, {"messages": HELLO, "prompt": "Hello", "n": 3, "stream": stream})
    error = reply.events[-2]["error"] if stream else reply.json["error"]
    assert "it broke" in error["message"]
    assert sum(ticket.cancelled.is_set() for ticket in served.core.tickets) == 2


def test_a_client_that_leaves_ends_all(serve: Serve) -> None:
    served = serve(script=says("word " * 500), token_s=0.02)
    body = {"messages": HELLO, "n": 3, "stream": True}
    served.run(served.ask_async("POST", CHAT, body, leave_after=5))
    assert [ticket.cancelled.is_set() for ticket in served.core.tickets] == [True] * 3


THOUGHT = "Let me see.\n</think>\n\nYes."


@pytest.mark.parametrize(
    ("form", "thoughts", "content"),
    [
        ("auto", "Let me see.", "Yes."),
        ("deepseek", "Let me see.", "Yes."),
        ("none", "", "<think>\nLet me see.\n</think>\n\nYes."),
        ("deepseek-legacy", "Let me see.", "<think>\nLet me see.\n</think>\n\nYes."),
    ],
)
@pytest.mark.parametrize("by_server", [False, True])
def test_where_thoughts_go(
    serve: Serve, qwen3_template: str, form: str, thoughts: str, content: str, by_server: bool
) -> None:
    served = serve(
        template=qwen3_template,
        script=says(THOUGHT),
        serving={"thought_form": form} if by_server else None,
    )
    body: dict[str, Any] = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}}
    body |= {} if by_server else {"reasoning_format": form}
    message = served.post(CHAT, body).json["choices"][0]["message"]
    assert (message.get("reasoning_content", ""), message["content"]) == (thoughts, content)
    deltas = [one["choices"][0]["delta"] for one in served.post(CHAT, {**body, "stream": True}).events[:-1]]
    assert "".join(one.get("reasoning_content") or "" for one in deltas) == thoughts
    assert "".join(one.get("content") or "" for one in deltas) == content


def test_thoughts_that_are_cut_off_stay_open(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("Let me see."))
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}, "reasoning_format": "none"}
    assert served.post(CHAT, body).json["choices"][0]["message"]["content"] == "<think>\nLet me see."
    assert served.post(CHAT, {**body, "reasoning_format": "loud"}).status == 400
