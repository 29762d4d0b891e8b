"""POST /v1/responses."""

from __future__ import annotations

from typing import Any

import pytest

from krasis.formats.errors import NativeError

from .conftest import Serve, says

PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "shell",
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}
CALL = '<tool_call>\n{"name": "shell", "arguments": {"command": "ls"}}\n</tool_call>'


def test_a_whole_response(serve: Serve) -> None:
    found = serve(script=says("Good day.")).post(PATH, {"model": "m", "input": "Hello"}).json
    message = found["output"][0]
    assert message["content"][0]["text"] == "Good day."
    assert (found["status"], found["object"], message["status"]) == ("completed", "response", "completed")
    assert found["usage"]["total_tokens"] > found["usage"]["input_tokens"] > 0
    for name in ("completed_at", "previous_response_id", "truncation", "text", "tools", "incomplete_details"):
        assert name in found


def test_a_stream_of_reasoning_text_and_a_call(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(f"<think>Hm.\n</think>\n\nSee: {CALL}"))
    events = served.post(PATH, {"input": "Hello", "tools": [TOOL], "stream": True}).events
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    kinds = [one["type"] for one in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    added = [one["item"]["type"] for one in events if one["type"] == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call"]
    text = "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
    thoughts = "".join(one["delta"] for one in events if one["type"] == "response.reasoning_text.delta")
    assert (text, thoughts) == ("See:", "Hm.")
    output = events[-1]["response"]["output"]
    assert [one["status"] for one in output] == ["completed"] * 3
    assert output[2]["arguments"] == '{"command": "ls"}'


def test_a_whole_turn_comes_back(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(f"<think>Hm.\n</think>\n\n{CALL}"))
    first = served.post(PATH, {"instructions": "Be brief.", "input": "List", "tools": [TOOL]}).json
    thoughts = {
        key: value for key, value in first["output"][0].items() if key != "content"
    }  # as Codex keeps them
    history = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "List"}]},
        thoughts,
        first["output"][1],
        {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "a.txt"},
        {"type": "web_search_call", "id": "x"},
    ]
    reply = served.post(
        PATH, {"instructions": "Be brief.", "input": history, "tools": [TOOL, {"type": "web_search"}]}
    )
    assert reply.status == 200
    text = served.core.assets.tokenizer.decode(served.core.requests[-1].prompt, skip_special=False)
    assert "<think>\nHm.\n</think>" in text
    assert CALL in text
    assert "<tool_response>\na.txt\n</tool_response>" in text
    assert "Be kind." in text
    assert text.count("<|im_start|>assistant") == 2


def test_silence_is_filled_with_in_progress(serve: Serve) -> None:
    served = serve(prefill_s=0.35, serving={"ping_interval_s": 0.1})
    kinds = [one["type"] for one in served.post(PATH, {"input": "Hello", "stream": True}).events]
    assert kinds.count("response.in_progress") >= 3


def test_the_longest_answer(serve: Serve) -> None:
    served = serve(script=says("one two three four"))
    found = served.post(PATH, {"input": "Hello", "max_output_tokens": 2}).json
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    kinds = [
        one["type"]
        for one in served.post(PATH, {"input": "x", "max_output_tokens": 2, "stream": True}).events
    ]
    assert kinds[-1] == "response.incomplete"


def test_an_error_in_the_middle_is_a_failed_response(serve: Serve) -> None:
    events = serve(script=lambda _: NativeError("it broke")).post(PATH, {"input": "x", "stream": True}).events
    assert events[-1]["type"] == "response.failed"
    assert "it broke" in events[-1]["response"]["error"]["message"]


def test_json_by_a_schema(serve: Serve) -> None:
    form = {
        "type": "json_schema",
        "name": "x",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    found = serve(script=says('Sure:\x1f{"a": 5}')).post(PATH, {"input": "x", "text": {"format": form}}).json
    assert found["output"][0]["content"][0]["text"] == '{"a": 5}'


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": 5},
        {"input": [5]},
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x", "conversation": "c"},
        {"input": "x", "background": True},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"role": "robot", "content": "x"}]},
        {"input": [{"type": "function_call", "arguments": "{}"}]},
        {"input": "x", "tools": [{"type": "function"}]},
        {"input": "x", "text": {"format": {"type": "poem"}}},
        {"input": "x", "reasoning": "hard"},
    ],
)
def test_what_cannot_be_served_is_refused(serve: Serve, body: Any) -> None:
    reply = serve().post(PATH, body)
    assert reply.status == 400, reply.text


def test_tokens_are_counted(serve: Serve) -> None:
    served = serve()
    counted = served.post(PATH + "/input_tokens", {"input": "Hello"}).json["input_tokens"]
    assert counted == served.post(PATH, {"input": "Hello"}).json["usage"]["input_tokens"]


def test_a_summary_that_is_asked_for_is_the_thoughts_themselves(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("Let me see.\n</think>\n\nYes."))
    body = {"input": "Hello", "stream": True, "chat_template_kwargs": {"enable_thinking": True}}
    events = served.post("/v1/responses", {**body, "reasoning": {"summary": "auto"}}).events
    kinds = [one["type"].rpartition("summary_")[2] for one in events if "reasoning_summary" in one["type"]]
    assert (kinds[0], kinds[-2:]) == ("part.added", ["text.done", "part.done"])
    deltas = [one["delta"] for one in events if one["type"] == "response.reasoning_summary_text.delta"]
    assert "".join(deltas) == "Let me see."
    (thoughts, _) = events[-1]["response"]["output"]
    assert thoughts["summary"] == [{"type": "summary_text", "text": "Let me see."}]
    plain = served.post("/v1/responses", body).events
    assert not any("reasoning_summary" in one["type"] for one in plain)
    assert plain[-1]["response"]["output"][0]["summary"] == []
