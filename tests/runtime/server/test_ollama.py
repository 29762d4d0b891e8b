"""Ollama's endpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import TOOLS, Serve, says

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **more}


def test_an_answer_comes_in_lines(serve: Serve) -> None:
    reply = serve(script=says("one two")).post("/api/chat", ask())
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert "".join(one["message"]["content"] for one in lines) == "one two"
    assert [one["done"] for one in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == "stop"
    assert lines[-1]["prompt_eval_count"] > 0
    assert lines[-1]["eval_count"] > 0


def test_an_answer_in_one_piece(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("Hm.\n</think>\n\nYes."))
    found = served.post("/api/chat", ask(stream=False, think=True, options={"num_predict": 50})).json
    assert found["message"] == {"role": "assistant", "content": "Yes.", "thinking": "Hm."}
    assert found["done"]
    request = served.core.requests[0]
    assert request.max_tokens == 50


def test_options_are_those_of_chat(serve: Serve) -> None:
    served = serve()
    options = {"temperature": 0.5, "top_k": 7, "seed": 3, "stop": ["x"], "num_predict": -1, "num_ctx": 9}
    assert served.post("/api/chat", ask(options=options)).status == 200
    request = served.core.requests[0]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 7, 3)
    assert (request.stops, request.max_tokens) == (("x",), None)


def test_a_call_and_what_came_of_it(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(CALL))
    lines = [json.loads(one) for one in served.post("/api/chat", ask(tools=TOOLS)).text.splitlines()]
    call = next(one["message"]["tool_calls"][0] for one in lines if "tool_calls" in one["message"])
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}
    rows = [
        *ask()["messages"],
        {"role": "assistant", "content": "", "tool_calls": [{"function": call["function"]}]},
        {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
    ]
    assert served.post("/api/chat", ask(messages=rows, tools=TOOLS)).status == 200
    assert "sunny" in served.core.assets.tokenizer.decode(served.core.requests[-1].prompt)


def test_a_schema_is_followed(serve: Serve) -> None:
    served = serve(script=says('Certainly!\x1f{"a": 1}'))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for form in ("json", schema):
        found = served.post("/api/chat", ask(format=form, stream=False)).json
        assert isinstance(json.loads(found["message"]["content"]), dict)


@pytest.mark.parametrize(
    "body",
    [
        ask(messages=[{"role": "user", "content": "x", "images": ["aGk="]}]),
        ask(messages=["x"]),
        ask(messages=5),
        ask(format="poem"),
        ask(think=5),
        ask(options=5),
        ask(options={"temperature": "warm"}),
        ask(tools=5),
        ask(stream="yes"),
    ],
)
def test_what_cannot_be_served_is_refused(serve: Serve, body: Any) -> None:
    reply = serve().post("/api/chat", body)
    assert reply.status == 400
    assert isinstance(reply.json["error"], str)


def test_what_clients_look_at(serve: Serve) -> None:
    served = serve(context=512)
    names = [one["name"] for one in served.get("/api/tags").json["models"]]
    assert names == ["tiny", "other"]
    assert served.get("/api/ps").json["models"][0]["context_length"] == 512
    shown = served.post("/api/show", {"model": "tiny"}).json
    assert shown["model_info"]["krasis.context_length"] == 512
    assert "tools" in shown["capabilities"]
    assert served.get("/api/version").json["version"]
    assert served.post("/api/generate", {"model": "tiny", "prompt": "x"}).status == 501
    assert served.post("/api/chat", ask(messages=[])).json["done_reason"] == "load"
