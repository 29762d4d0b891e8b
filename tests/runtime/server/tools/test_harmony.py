"""Calls in gpt-oss's format, behind what parts its thinking from its answer, in every split of the text."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.tools.harmony import HARMONY
from krasis.runtime.server.tools.splitter import CallSplitter
from krasis.runtime.text.thinking import Format, ThinkingSplitter

MARKS = Format(
    "<|channel|>analysis<|message|>",
    ("<|end|>", "<|channel|>final<|message|>"),
    ("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
    anywhere=True,
)
THOUGHT = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
WEATHER = [("get_weather", {"city": "Oslo }", "days": [1, 2]})]
BODY = '{"city": "Oslo }", "days": [1, 2]}'


def parse(pieces: list[str], *, truncated: bool = False) -> tuple[str, str, list[tuple[str, object]]]:
    """(answer, reasoning, calls)."""
    thinking, calls = ThinkingSplitter((MARKS,)), CallSplitter(HARMONY)
    segments = [one for piece in pieces for one in thinking.push(piece)] + thinking.finish()
    parts = [part for kind, text in segments for part in calls.push(kind, text)]
    parts += calls.finish(truncated=truncated)
    texts = {"answer": "", "reasoning": ""}
    for part in parts:
        if isinstance(part, Text):
            texts[part.kind] += part.text
    found = [(one.name, json.loads(one.arguments)) for one in parts if isinstance(one, Call)]
    return texts["answer"], texts["reasoning"], found


@pytest.mark.parametrize(
    ("text", "answer", "thought", "calls"),
    [
        (f"{THOUGHT} to=functions.get_weather<|channel|>commentary json<|message|>{BODY}", "", True, WEATHER),
        (f"{THOUGHT}<|channel|>commentary to=functions.get_weather json<|message|>{BODY}", "", True, WEATHER),
        (f"{THOUGHT}<|channel|>commentary to=functions.get_weather <|message|>{BODY}", "", True, WEATHER),
        (f"<|channel|>commentary to=functions.get_weather json<|message|>{BODY}", "", False, WEATHER),
        (f"<|channel|>analysis to=functions.get_weather json<|message|>{BODY}", "", False, WEATHER),
        (
            f"{THOUGHT}<|channel|>commentary<|message|>I ask.<|end|><|start|>assistant"
            f" to=functions.get_weather<|channel|>commentary json<|message|>{BODY}",
            None,
            True,
            WEATHER,
        ),
        (f"{THOUGHT}<|channel|>final<|message|>Use to=functions.f {{}}", "Use to=functions.f {}", True, []),
        (f"{THOUGHT}<|channel|>commentary to=browser.search json<|message|>{BODY}", None, True, []),
        (f"{THOUGHT} to=functions.f<|channel|>commentary json<|message|>[1]", None, True, []),
        (f"{THOUGHT} to=functions.f<|channel|>commentary json<|message|>{{'a': NaN}}", None, True, []),
    ],
)  # fmt: skip
def test_calls(text: str, answer: str | None, thought: bool, calls: list[tuple[str, object]]) -> None:
    expected = parse([text])
    assert expected[1:] == ("Look it up." if thought else "", calls)
    if answer is not None:
        assert expected[0] == answer
    for seed in range(12):
        rng, rest, pieces = random.Random(seed), text, []
        while rest:
            size = 1 if seed == 0 else rng.randint(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert parse(pieces) == expected, pieces


def test_what_is_cut_off_is_dropped() -> None:
    call = f"<|channel|>commentary to=functions.get_weather json<|message|>{BODY}"
    for size in range(len("<|channel|>commentary to=functions."), len(call) - 1):
        assert parse([THOUGHT + call[:size]], truncated=True)[2] == []


def test_long_arguments_take_linear_time() -> None:
    value = "x } { " * 30_000
    call = f"to=functions.write<|channel|>commentary json<|message|>{json.dumps({'content': value})}"
    begin = time.process_time()
    pieces = [call[at : at + 7] for at in range(0, len(call), 7)]
    assert parse(pieces)[2] == [("write", {"content": value})]
    assert time.process_time() - begin < 4


FORM = """{% for message in messages %}<|start|>{{ message.role }}{% if message.tool_calls %} to={{
"functions." + message.tool_calls[0].function.name }}<|channel|>commentary json<|message|>{{
message.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|message|>{{ message.content
}}<|end|>{% endif %}{% endfor %}<|start|>assistant"""


def test_a_template_of_the_format_is_known(serve: Any) -> None:
    """The released one puts recipient and name together from pieces."""
    assert serve(template=FORM).service.prompts.call_format is HARMONY
