"""Answers that go on with the last message instead of beginning a new one."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Serve, says

CHAT = "/v1/chat/completions"
BEGUN = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "The colour is "},
]
ON = {"continue_final_message": True, "add_generation_prompt": False}


def ask(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"messages": messages, **more}


def test_the_prompt_ends_where_the_message_does(serve: Serve) -> None:
    served = serve(script=says("blue."))
    found = served.post(CHAT, ask(BEGUN, **ON)).json
    assert found["choices"][0]["message"]["content"] == "blue."
    shown = served.post("/apply-template", ask(BEGUN, **ON)).json["prompt"]
    assert shown.endswith("<|im_start|>assistant\nThe colour is ")
    assert served.core.requests[-1].prompt == served.service.prompts.tokens(shown)


def test_parts_and_blanks_stay_as_they_are(serve: Serve, qwen3_template: str) -> None:
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "colour\n"}]
    body = ask([BEGUN[0], {"role": "assistant", "content": parts}], **ON)
    shown = serve(template=qwen3_template).post("/apply-template", body).json["prompt"]
    assert shown.endswith("The colour\n")


def test_a_begun_answer_is_gone_on_with_unless_a_new_one_is_wanted(serve: Serve) -> None:
    served = serve()
    plain, gone_on = (served.post("/apply-template", ask(BEGUN, **more)).json for more in ({}, ON))
    assert plain == gone_on
    for wanted in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        shown = served.post("/apply-template", ask(BEGUN, **wanted)).json["prompt"]
        assert "The colour is" in shown
        assert shown.rstrip().endswith("<|im_start|>assistant")


def test_an_assistant_that_has_called_or_said_nothing_is_not_gone_on_with(serve: Serve) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    served = serve()
    calling = {"role": "assistant", "content": "Hm.", "tool_calls": [call]}
    for last in (calling, {"role": "assistant", "content": ""}):
        shown = served.post("/apply-template", ask([BEGUN[0], last])).json["prompt"]
        assert shown.rstrip().endswith("<|im_start|>assistant")


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": True}),
        (BEGUN, {"continue_final_message": "yes"}),
        (BEGUN[:1], ON),
        ([*BEGUN, {"role": "assistant", "content": "blue."}], {}),  # which of the two is begun?
        (
            [*BEGUN, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            ON,
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    serve: Serve, messages: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    reply = serve().post(CHAT, ask(messages, **more))
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_two_answers_in_a_row_are_what_the_request_says(serve: Serve) -> None:
    served = serve()
    two = [*BEGUN, {"role": "assistant", "content": "Yes, "}]
    for wanted, end in ((ON, "assistant\nYes, "), ({"continue_final_message": False}, "assistant\n")):
        shown = served.post("/apply-template", ask(two, **wanted)).json["prompt"]
        assert "The colour is" in shown
        assert shown.endswith(end)


def test_anthropics_clients_begin_an_answer_by_the_last_message_alone(serve: Serve) -> None:
    served = serve(script=says("blue."))
    counted = served.post("/v1/messages/count_tokens", ask(BEGUN)).json["input_tokens"]
    found = served.post("/v1/messages", ask(BEGUN, max_tokens=9)).json
    assert found["content"][0]["text"] == "blue."
    wanted = served.post("/apply-template", ask(BEGUN, **ON)).json["prompt"]
    assert served.core.requests[-1].prompt == served.service.prompts.tokens(wanted)
    assert counted == len(served.core.requests[-1].prompt)
