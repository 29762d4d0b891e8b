"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any

import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.serving.api import QueueFullError

from .conftest import Serve, says

PATH = "/v1/messages"
TOOL = {
    "name": "get_weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "claude", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}], **more}


def prompt_of(served: Any, at: int = -1) -> str:
    return str(served.core.assets.tokenizer.decode(served.core.requests[at].prompt, skip_special=False))


def test_a_whole_message(serve: Serve) -> None:
    found = serve(script=says("Good day.")).post(PATH, ask()).json
    assert found["content"] == [{"type": "text", "text": "Good day.", "citations": None}]
    assert (found["type"], found["role"], found["model"], found["stop_reason"]) == (
        "message",
        "assistant",
        "claude",
        "end_turn",
    )
    assert found["usage"]["input_tokens"] > 0
    assert found["usage"]["cache_read_input_tokens"] == 0


def test_a_stream_of_thinking_text_and_a_call(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(f"Hm.\n</think>\n\nSee: {CALL}"))
    body = ask(stream=True, tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024})
    events = served.post(PATH + "?beta=true", body).events
    kinds = [one["type"] for one in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    starts = [
        (one["index"], one["content_block"]["type"]) for one in events if one["type"] == "content_block_start"
    ]
    assert starts == [(0, "thinking"), (1, "text"), (2, "tool_use")]
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    assert "".join(one.get("thinking", "") for one in deltas) == "Hm."
    assert "".join(one.get("text", "") for one in deltas) == "See:"
    assert "".join(one.get("partial_json", "") for one in deltas) == '{"city": "Oslo"}'
    assert kinds.count("content_block_stop") == 3
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] > 0


def test_a_whole_call(serve: Serve, qwen3_template: str) -> None:
    found = serve(template=qwen3_template, script=says(CALL)).post(PATH, ask(tools=[TOOL])).json
    assert found["stop_reason"] == "tool_use"
    assert found["content"][0]["input"] == {"city": "Oslo"}
    assert found["content"][0]["id"].startswith("toolu_")


def test_results_of_tools_and_thoughts_come_back(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(CALL))
    use = served.post(PATH, ask(tools=[TOOL])).json["content"][0]
    history = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, use]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": use["id"],
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "text", "text": "And tomorrow?"},
            ],
        },
    ]
    assert served.post(PATH, ask(tools=[TOOL], messages=history)).status == 200
    text = prompt_of(served)
    assert "<think>\nHm.\n</think>" in text
    assert CALL in text
    assert text.index("<tool_response>\nsunny") < text.index("And tomorrow?")


def test_the_billing_line_is_dropped_and_a_system_message_may_come_late(
    serve: Serve, qwen3_template: str
) -> None:
    served = serve(template=qwen3_template)
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=abc"},
        {"type": "text", "text": "Be brief."},
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Mode: plan."}]
    assert served.post(PATH, ask(system=system, messages=messages)).status == 200
    text = prompt_of(served)
    assert "billing" not in text
    assert "Be brief." in text
    assert "Mode: plan." in text


def test_silence_is_filled_with_empty_deltas_of_an_open_block(serve: Serve) -> None:
    served = serve(prefill_s=0.4, serving={"ping_interval_s": 0.1})
    events = served.post(PATH, ask(stream=True)).events
    assert [one["type"] for one in events[2:5]] == [
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
    ]
    assert events[3]["delta"] == {"type": "text_delta", "text": ""}
    assert sum(one["type"] == "content_block_start" for one in events) == 1
    texts = [one["delta"]["text"] for one in events if one["type"] == "content_block_delta"]
    assert "".join(texts) == "Hello there."


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        (ask(max_tokens=2), "max_tokens", None),
        (ask(stop_sequences=["STOP"]), "stop_sequence", "STOP"),
        (ask(), "end_turn", None),
    ],
)
def test_why_it_ended(serve: Serve, body: Any, reason: str, sequence: str | None) -> None:
    found = serve(script=says("one two STOP three")).post(PATH, body).json
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, sequence)


def test_a_forced_tool(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("No.\x1f" + CALL))
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        found = served.post(PATH, ask(tools=[TOOL], tool_choice=choice)).json
        assert [one["type"] for one in found["content"]] == ["tool_use"]


def test_tokens_are_counted_as_they_are_used(serve: Serve) -> None:
    served = serve()
    counted = served.post(PATH + "/count_tokens", {"model": "x", "messages": ask()["messages"]}).json
    assert counted["input_tokens"] == served.post(PATH, ask()).json["usage"]["input_tokens"]


def test_errors_in_its_own_form(serve: Serve) -> None:
    full = serve(refusal=QueueFullError("full", retry_after_s=3)).post(PATH, ask())
    assert (full.status, full.json["error"]["type"], full.headers["retry-after"]) == (
        429,
        "rate_limit_error",
        "3",
    )
    long = serve(context=32).post(PATH, ask(messages=[{"role": "user", "content": "word " * 50}]))
    assert long.status == 400
    assert long.json["error"]["message"].startswith("prompt is too long: ")
    assert long.json["error"]["message"].endswith(" > 32 maximum")
    key = serve(serving={"api_keys": ("secret",)}).post(PATH, ask(), x_api_key="wrong")
    assert (key.status, key.json["error"]["type"]) == (401, "authentication_error")
    events = serve(script=lambda _: NativeError("it broke")).post(PATH, ask(stream=True)).events
    assert events[-1]["type"] == "error"
    assert "it broke" in events[-1]["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [5]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
        ask(system=5),
        ask(tools=[5]),
        ask(tools=[{"name": "x"}]),
        ask(tool_choice={"type": "tool", "name": "unknown"}),
        ask(tool_choice={"type": "perhaps"}),
        ask(thinking=True),
        ask(max_tokens=0),
        ask(temperature=[]),
        ask(stop_sequences="x" * 5000),
    ],
)
def test_what_cannot_be_served_is_refused(serve: Serve, body: Any) -> None:
    reply = serve().post(PATH, body)
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error"), reply.text
