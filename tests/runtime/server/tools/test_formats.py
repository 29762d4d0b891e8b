"""Calls in every format: what a template writes is what is read, however it arrives; and what is none."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.runtime.server.tools.calls import Call, CallFormat, Text
from krasis.runtime.server.tools.known import FORMATS, format_of
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.server.tools.splitter import CallSplitter
from tests.support.call_templates import TEMPLATES, written

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "from": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array", "items": {"type": "string"}},
        "inner": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}},
    },
    "required": ["text"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("write", "get-it")
]
BY_NAME = {one.name: one for one in FORMATS}
NAMES = sorted(BY_NAME)
ONE_A_TURN = ("harmony", "gigachat")  # the model stops behind a call
SAMPLE = (
    "write",
    {"text": 'a {b} "c"\n<d>, é', "count": -2, "items": ["x, y", "]"], "inner": {"a": "}", "b": 1}},
)
OTHER = ("get-it", {"text": "", "flag": True, "from": "it's", "ratio": 1.5})


def parse(
    form: CallFormat, pieces: list[str], *, truncated: bool = False, tools: Any = TOOLS
) -> tuple[str, list[tuple[str, Any]]]:
    """(words, calls)."""
    splitter = CallSplitter(form, tools)
    parts = [part for one in pieces for part in splitter.push("answer", one)]
    parts += splitter.finish(truncated=truncated)
    words = "".join(one.text for one in parts if isinstance(one, Text))
    return words, [(one.name, json.loads(one.arguments)) for one in parts if isinstance(one, Call)]


def sample(name: str) -> tuple[str, list[tuple[str, Any]]]:
    """A text with calls, and these."""
    calls = [SAMPLE] if name in ONE_A_TURN else [SAMPLE, OTHER]
    return written(name, *calls), calls


def test_every_format_has_a_template() -> None:
    assert sorted(TEMPLATES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_template_of_the_format_is_known(name: str) -> None:
    assert format_of(TEMPLATES[name]) is BY_NAME[name]
    assert format_of("{% for tool in tools %}", lambda one: one == "<|tool_call_start|>").name == "lfm2"
    assert format_of("{{ messages }}", lambda _: True).name == "hermes"


@pytest.mark.parametrize("name", NAMES)
def test_it_does_not_matter_how_calls_arrive(name: str) -> None:
    form, (text, calls) = BY_NAME[name], sample(name)
    said = "" if form.at_start else "See.\n"
    assert parse(form, list(said + text)) == (said.strip(), calls)
    few = [("write", {"text": "a<b", "count": 1})]
    text = written(name, *few)
    for at in range(len(text)):
        assert parse(form, [said + text[:at], text[at:]]) == (said.strip(), few), text[:at]


@pytest.mark.parametrize("name", NAMES)
def test_calls_come_as_they_are_whole(name: str) -> None:
    """The first is given out before the second is written, but where a list is one piece of Python."""
    form, (text, calls) = BY_NAME[name], sample(name)
    if len(calls) < 2 or name == "lfm2":
        return
    splitter = CallSplitter(form, TOOLS)
    at = text.rindex("get-it")
    found = [one for one in splitter.push("answer", text[: at + 6]) if isinstance(one, Call)]
    assert [(one.name, json.loads(one.arguments)) for one in found] == [SAMPLE]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_off_is_dropped(name: str) -> None:
    form, (text, calls) = BY_NAME[name], sample(name)
    for size in range(0, len(text), 3):
        words, found = parse(form, [text[:size]], truncated=True)
        assert found == calls[: len(found)]
        if "write" not in words and not form.at_start:
            assert "count" not in words


VALUES = {
    "text": st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12),
    "from": st.sampled_from(["", " ", "</", "<|", "null", "1", "true", "'\\\"", "[x]", "{", "a: b, c"]),
    "count": st.integers(-(2**53), 2**53),
    "ratio": st.sampled_from([0.5, -1e-7, 1e20]),
    "flag": st.booleans(),
    "items": st.lists(st.sampled_from(["a", "b c", ","]), min_size=1, max_size=2),
    "inner": st.fixed_dictionaries({"a": st.sampled_from(["x", "y z"]), "b": st.integers(0, 9)}),
}
ARGUMENTS = st.fixed_dictionaries(
    {"text": VALUES["text"]}, optional={k: v for k, v in VALUES.items() if k != "text"}
)


@pytest.mark.parametrize("name", NAMES)
@given(values=ARGUMENTS, size=st.integers(1, 9))
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_what_is_read_is_what_was_written(name: str, values: dict[str, Any], size: int) -> None:
    text = written(name, ("write", values))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert parse(BY_NAME[name], pieces) == ("", [("write", values)])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_breaks_it_and_nothing_is_lost(name: str) -> None:
    form, (text, _) = BY_NAME[name], sample(name)
    bits = [text[at : at + 9] for at in range(0, len(text), 9)]
    bits += [*form.openers, "write", " ", "\n", "{", "}", '"', "]", ",", "\0", "é", "\ud800"]
    for seed in range(30):
        rng = random.Random(seed)
        pieces = [rng.choice(bits) for _ in range(rng.randint(1, 30))]
        words, found = parse(form, pieces)
        assert (words, found) == parse(form, ["".join(pieces)])
        if not found:
            assert words == "".join(pieces)


@pytest.mark.parametrize("name", NAMES)
def test_malformed_calls_are_words(name: str) -> None:
    form = BY_NAME[name]
    text, _ = sample(name)
    for opener in (*form.openers, *form.at_start):
        for rest in ("", "x", " and words.\n" * 60, "{", "[", "{]}", '{"name": 5}', "[write(1)]", "[f(a=b)]"):
            assert parse(form, [opener, rest]) == (opener + rest, []), rest
    if not form.at_start:  # a call that is behind one that is none
        words, found = parse(form, [form.openers[0], " no\n", text])
        assert (words.split("\n")[0], found[-1:]) == (f"{form.openers[0]} no", sample(name)[1][-1:])


@pytest.mark.parametrize("name", NAMES)
def test_long_arguments_take_linear_time(name: str) -> None:
    """Seen: at most 0.1 s each; what looks again at all it has takes minutes."""
    form = BY_NAME[name]
    for value in ("x < y, } " * 2_000, "<|tool" * 2_500):
        text = written(name, ("write", {"text": value}))
        begin = time.process_time()
        assert parse(form, [text[at : at + 7] for at in range(0, len(text), 7)])[1] == [
            ("write", {"text": value})
        ]
        assert time.process_time() - begin < 2


@pytest.mark.parametrize("name", ["cohere", "lfm2", "minimax_m3"])
def test_what_never_becomes_a_call_takes_linear_time(name: str) -> None:
    """Seen: at most 0.1 s each; what cuts sign after sign off takes ten."""
    form = BY_NAME[name]
    for signs in ("[,", "\n ", "[x,"):
        text = form.openers[0] + signs * 4_000
        begin = time.process_time()
        assert parse(form, [text[at : at + 7] for at in range(0, len(text), 7)]) == (text, [])
        assert time.process_time() - begin < 2


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_come_back_are_as_the_model_wrote_them(name: str) -> None:
    form, replay = BY_NAME[name], Replay()
    text, calls = sample(name)
    odd = text.replace('"count": -2', '"count":  -2').replace(
        "<d>, é", "<d>, \\u00e9" if '\\"c' in text else "<d>, é"
    )
    parts = CallSplitter(form, TOOLS)
    found = [
        one for one in [*parts.push("answer", odd), *parts.finish(truncated=False)] if isinstance(one, Call)
    ]
    rows = [{"tool_calls": [{"id": replay.remember(one)} for one in found]}]
    example = f"So: {text[: len(text) // 3]} ... or {written(name, ('write', {'text': 'x'}))}.\n"
    around = f"{example}{text} The end"
    assert replay.restored(around, rows, form, TOOLS) == f"{example}{odd} The end"
    # One that the client changed stays as it is; the others are still the model's.
    changed = written(name, ("write", {"text": "other"}), *calls[1:])
    wanted = changed if len(calls) < 2 or name == "lfm2" else changed.replace(found[1].raw, found[1].raw)
    assert replay.restored(changed, rows, form, TOOLS) == wanted
