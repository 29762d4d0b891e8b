"""Calls of tools over the wire: offered, forced, forbidden, and sent back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import TOOLS, Serve, says

CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city":  "Z\\u00fcrich"}}\n</tool_call>'

FORCED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def ask(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS, **more}


def test_a_call_is_a_call(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(f"Let me see. {CALL}"))
    choice = served.post(CHAT, ask()).json["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert call["function"] == {"name": "get_weather", "arguments": '{"city":  "Z\\u00fcrich"}'}
    assert len(call["id"]) > 20


def test_a_streamed_call_has_its_index_and_its_id_first(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(CALL + "\n" + CALL))
    events = served.post(CHAT, ask(stream=True)).events[:-1]
    deltas = [
        one["choices"][0]["delta"]["tool_calls"][0]
        for one in events
        if "tool_calls" in one["choices"][0]["delta"]
    ]
    assert [one["index"] for one in deltas] == [0, 0, 1, 1]
    assert deltas[0]["type"] == "function"
    assert deltas[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert "id" not in deltas[1]
    assert json.loads(deltas[1]["function"]["arguments"]) == {"city": "Zürich"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert deltas[0]["id"] != deltas[2]["id"]


def test_what_only_looks_like_a_call_is_text(serve: Serve, qwen3_template: str) -> None:
    for text in ("<tool_call>not JSON</tool_call>", 'Say <tool_call> {"name": 5} </tool_call>.', "a <tool_c"):
        choice = serve(template=qwen3_template, script=says(text)).post(CHAT, ask()).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_a_call_that_is_cut_off_is_none(serve: Serve, qwen3_template: str) -> None:
    choice = (
        serve(template=qwen3_template, script=says(CALL)).post(CHAT, ask(max_tokens=12)).json["choices"][0]
    )
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert "tool_call" not in choice["message"]["content"]


def test_without_tools_nothing_is_a_call(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(CALL))
    for body in (ask(tools=[]), ask(tool_choice="none")):
        assert served.post(CHAT, body).json["choices"][0]["message"]["content"] == CALL


def test_a_template_without_tools_is_told_of_them_all_the_same(serve: Serve) -> None:
    served = serve(script=says(CALL))
    message = served.post(CHAT, ask()).json["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"
    answered = [
        *ask()["messages"],
        {"role": "assistant", "content": None, "tool_calls": message["tool_calls"]},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert served.post(CHAT, ask(messages=answered)).status == 200
    text = served.core.assets.tokenizer.decode(served.core.requests[-1].prompt)
    assert "get_weather" in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("template", [None, "qwen3", "xml", "glm"])
def test_a_forced_call_has_the_schemas_arguments(
    serve: Serve, choice: Any, template: str | None, qwen3_template: str
) -> None:
    marks = {"qwen3": "", "xml": "{# <function= #}", "glm": "{# <arg_key> #}"}
    source = None if template is None else qwen3_template + marks[template]
    xml = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    )
    glm = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    written = {"xml": xml, "glm": glm}.get(template or "", FORCED)
    served = serve(template=source, script=says(f"I would rather not.\x1f{written}\x1f Sorry."))
    found = served.post(CHAT, ask(tool_choice=choice)).json["choices"][0]
    arguments = json.loads(found["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"city": "Oslo"}
    assert found["finish_reason"] == "tool_calls"


def test_a_forced_call_comes_after_the_thinking(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says("Hm.\n</think>Well\x1f" + FORCED))
    body = ask(tool_choice="required", chat_template_kwargs={"enable_thinking": True})
    message = served.post(CHAT, body).json["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"


def test_a_call_that_comes_back_is_as_the_model_wrote_it(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template, script=says(CALL))
    call = served.post(CHAT, ask()).json["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["arguments"] == '{"city":  "Z\\u00fcrich"}'
    again = {**call, "function": {"name": "get_weather", "arguments": '{"city":"Zürich"}'}}
    history = [
        *ask()["messages"],
        {"role": "assistant", "content": None, "tool_calls": [again]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    usage = served.post(CHAT, ask(messages=history)).json["usage"]
    assert CALL in served.core.assets.tokenizer.decode(served.core.requests[-1].prompt, skip_special=False)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(served.core.prompts[0])
    changed = {**call, "function": {"name": "get_weather", "arguments": '{"city":"Bern"}'}}
    history[1] = {"role": "assistant", "content": None, "tool_calls": [changed]}
    served.post(CHAT, ask(messages=history))
    assert "Bern" in served.core.assets.tokenizer.decode(served.core.requests[-1].prompt)


@pytest.mark.parametrize("arguments", ["{not json", "[1, 2]", "", '"text"', '{"a": NaN}', "{" * 3000])
@pytest.mark.parametrize("takes_text", [True, False])
def test_malformed_arguments_of_earlier_turns_are_read_as_text(
    serve: Serve, qwen3_template: str, arguments: str, takes_text: bool
) -> None:
    template = qwen3_template if takes_text else qwen3_template.replace(" is string", " is undefined")
    served = serve(template=template, context=8192)
    call = {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    history = [*ask()["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert served.post(CHAT, ask(messages=history)).status == 200


def test_other_kinds_of_tools_are_left_out(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template)
    tools = [*TOOLS, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": [{"name": "inner"}]}]
    assert served.post(CHAT, ask(tools=tools)).status == 200
    text = served.core.assets.tokenizer.decode(served.core.requests[0].prompt)
    assert "inner" in text
    assert "web_search" not in text


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            },
        },
    ],
)
def test_an_answer_in_json(serve: Serve, form: Any) -> None:
    found = (
        serve(script=says('Certainly!\x1f{"a": 1}')).post(CHAT, ask(tools=None, response_format=form)).json
    )
    assert isinstance(json.loads(found["choices"][0]["message"]["content"]), dict)


def test_a_schema_that_nothing_can_follow_is_refused(serve: Serve) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    reply = serve().post(CHAT, ask(response_format=form))
    assert (reply.status, reply.json["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"role": "system", "content": "One."},
            {"role": "developer", "content": "Two."},
            {"role": "user", "content": "Hi"},
        ],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes"},
            {"role": "system", "content": "Two."},
        ],
        [
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": "Two."},
            {"role": "user", "content": "And?"},
        ],
        [{"role": "user", "content": "Hi"}, {"role": "developer", "content": "Two."}],
    ],
)
def test_system_messages_anywhere(serve: Serve, qwen3_template: str, rows: Any) -> None:
    strict = qwen3_template.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}"
        "{% if message.role not in ('user', 'assistant', 'tool') and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}",
    )
    for template in (qwen3_template, strict):
        served = serve(template=template)
        assert served.post(CHAT, {"messages": rows}).status == 200
        text = served.core.assets.tokenizer.decode(served.core.requests[0].prompt)
        assert "Two." in text
        assert text.index("Hi") < text.index("Two.") or rows[0]["role"] == "system"


def test_questions_beside_a_conversation_are_told_apart(serve: Serve, qwen3_template: str) -> None:
    served = serve(template=qwen3_template)
    task = [{"role": "user", "content": "### Task:\nGenerate a title."}]
    session = {"x_session_id": "a"}
    served.post(CHAT, ask(tools=None, max_tokens=5))
    served.post(CHAT, ask(tools=None), **session)  # nothing is known yet
    served.post(CHAT, ask(), **session)
    served.post(CHAT, ask(tools=None), **session)
    served.post(CHAT, ask(tools=None), x_session_id="b")
    served.post(CHAT, {"messages": task})
    assert [one.side for one in served.core.requests] == [False, False, False, True, False, True]
    assert [one.conversation for one in served.core.requests] == ["", "a", "a", "a", "b", ""]


def test_an_answer_by_a_grammar(serve: Serve) -> None:
    body = ask(tools=None, grammar='root ::= "a" [0-9]+ | "no"')
    served = serve(script=says("Well,\x1fa\x1f7\x1f!"))
    assert served.post(CHAT, body).json["choices"][0]["message"]["content"] == "a7"
    for grammar in ("root ::= other", "((((", "root ::= " + "(" * 5000, "", 5):
        reply = served.post(CHAT, {**body, "grammar": grammar})
        assert (reply.status, reply.json["error"]["param"]) == (400, "grammar"), grammar
