"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Serve, says

PATH = "/v1/completions"


def test_a_text_goes_on(serve: Serve) -> None:
    served = serve(script=says(" world"))
    found = served.post(PATH, {"prompt": "Hello"}).json
    assert found["choices"][0] == {"index": 0, "text": " world", "logprobs": None, "finish_reason": "stop"}
    assert served.core.requests[0].is_plain
    assert served.core.requests[0].max_tokens == 16


def test_what_measures_perplexity_gets_the_prompts_log_probabilities(serve: Serve) -> None:
    served = serve(script=says("!"))
    ids = served.core.assets.tokenizer.encode("Hello there, world")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234, "temperature": 0}
    choice = served.post(PATH, body).json["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"].startswith("Hello there, world")
    assert scores["token_logprobs"] == [None] + [-0.5] * len(ids)
    assert scores["top_logprobs"][0] is None
    assert all(one == -0.5 for tops in scores["top_logprobs"][1:] for one in tops.values())
    assert "".join(scores["tokens"]) == choice["text"]
    assert scores["text_offset"][1] == len(scores["tokens"][0])


def test_several_prompts_have_several_answers(serve: Serve) -> None:
    served = serve(script=says("!"))
    found = served.post(PATH, {"prompt": ["One", "Two", "Three"]}).json
    assert [one["index"] for one in found["choices"]] == [0, 1, 2]
    assert len(served.core.requests) == 3
    assert served.service._num_open == 0


def test_a_stream(serve: Serve) -> None:
    served = serve(script=says(" world"))
    body = {"prompt": "Hello", "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = served.post(PATH, body).events
    assert "".join(one["choices"][0]["text"] for one in chunks) == "Hello world"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] > 0
    assert done == "[DONE]"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 5},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [4096]},
        {"prompt": [-1]},
        {"prompt": [1.5]},
        {"prompt": [{}]},
        {"prompt": "x", "n": 129},
        {"prompt": ["x", "y"], "n": 65},
        {"prompt": "x", "best_of": 3},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "logprobs": 50},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": ["x"] * 129},
    ],
)
def test_what_cannot_be_served_is_refused(serve: Serve, body: Any) -> None:
    reply = serve().post(PATH, body)
    assert reply.status == 400, reply.text


@pytest.mark.parametrize("path", [PATH, "/completion"])
def test_an_empty_prompt_is_refused_by_its_field(serve: Serve, path: str) -> None:
    reply = serve().post(path, {"prompt": ""})
    assert (reply.status, reply.json["error"]["param"]) == (400, "prompt")
