"""Calls of tools in a model's text, in every split of it."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from krasis.runtime.server.tools.calls import Call, CallFormat, Text
from krasis.runtime.server.tools.coerce import read_value
from krasis.runtime.server.tools.hermes import HERMES
from krasis.runtime.server.tools.known import ARG_KEYS
from krasis.runtime.server.tools.splitter import CallSplitter
from krasis.runtime.server.tools.xml import XML

Parsed = tuple[str, str, list[tuple[str, Any]]]

WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "content": {"type": "string"},
                "mode": {"type": "integer"},
            },
        },
    },
}


def parse(form: CallFormat, segments: list[tuple[str, str]], *, truncated: bool = False) -> Parsed:
    """(answer, reasoning, calls)."""
    splitter = CallSplitter(form, [WRITE])
    parts = [part for kind, text in segments for part in splitter.push(kind, text)]
    parts += splitter.finish(truncated=truncated)
    texts = {"answer": "", "reasoning": ""}
    for part in parts:
        if isinstance(part, Text):
            texts[part.kind] += part.text
    calls = [(one.name, json.loads(one.arguments)) for one in parts if isinstance(one, Call)]
    return texts["answer"], texts["reasoning"], calls


def check(form: CallFormat, text: str, answer: str, calls: list[Any], *, truncated: bool = False) -> None:
    """The same result for the whole, for single characters and for random pieces."""
    ways = [[text], list(text)]
    for seed in range(8):
        rng, rest, pieces = random.Random(seed), text, []
        while rest:
            size = rng.randint(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        ways.append(pieces)
    for pieces in ways:
        found = parse(form, [("answer", one) for one in pieces], truncated=truncated)
        assert found == (answer, "", calls), pieces


def hermes(arguments: str, name: str = "write") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(**values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=write>\n{inside}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        (hermes('{"path": "a"}'), "", [("write", {"path": "a"})]),
        (
            "Now. " + hermes("{}") + "\n" + hermes('{"mode": 1}'),
            "Now.",
            [("write", {}), ("write", {"mode": 1})],
        ),
        (
            hermes('{"content": "</tool_call> <tool_call> \\" } {"}'),
            "",
            [("write", {"content": '</tool_call> <tool_call> " } {'})],
        ),
        (hermes('{"content": "\\\\"}') + " Done.", "Done.", [("write", {"content": "\\"})]),
        ('<tool_call>{"name": "write"}</tool_call>', "", [("write", {})]),
        (
            '<tool_call>{"name": "write", "arguments": "{\\"mode\\": 2}"}</tool_call>',
            "",
            [("write", {"mode": 2})],
        ),
        ('<tool_call>{"name": "write", "parameters": {"mode": 2}}', "", [("write", {"mode": 2})]),
        ('<tool_call>{"name": "write", "arguments": {"mode": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "write", "arguments": {"mode": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "write", "arguments": [1]}</tool_call>', None, []),
        ("<tool_call>[]</tool_call>", None, []),
        ("<tool_call><tool_call></tool_call>", None, []),
        ('<tool_call>{"name": "write", "arguments": {]}}</tool_call>', None, []),
        ("a < b <tool", None, []),
        ("<tool_call>", None, []),
        ("", None, []),
        (
            "no " + hermes("{bad}") + " " + hermes('{"mode": 3}'),
            'no <tool_call>\n{"name": "write", "arguments": {bad}}\n</tool_call>',
            [("write", {"mode": 3})],
        ),
    ],
)
def test_hermes(text: str, answer: str | None, calls: list[Any]) -> None:
    check(HERMES, text, text if answer is None else answer, calls)


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        (xml(path="a", mode="5"), "", [("write", {"path": "a", "mode": 5})]),
        (
            xml(content="</tool_call>\n<function=x>\n</function>\nend"),
            "",
            [("write", {"content": "</tool_call>\n<function=x>\n</function>\nend"})],
        ),
        (
            xml(content=xml(path="a") + "\nthat was it"),
            "",
            [("write", {"content": xml(path="a") + "\nthat was it"})],
        ),
        (
            xml(content="if a < b:\n    </parameter> is text"),
            "",
            [("write", {"content": "if a < b:\n    </parameter> is text"})],
        ),
        (xml(content="\n  kept  \n"), "", [("write", {"content": "\n  kept  \n"})]),
        (xml(content="<function=x>\nopen"), "", [("write", {"content": "<function=x>\nopen"})]),
        (xml(other="{1}"), "", [("write", {"other": "{1}"})]),
        (xml(mode="five"), "", [("write", {"mode": "five"})]),
        (xml(mode="9" * 5000), "", [("write", {"mode": "9" * 5000})]),
        ("See.\n\n" + xml().replace("<tool_call>\n", ""), "See.", [("write", {})]),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", None, []),
        ("<tool_call>\n<function=a\nb>\n</function>", None, []),
        ("<tool_call>text</tool_call>", None, []),
        ("<function=write>\nwords", None, []),
        ("Use <function= for it, or <function", None, []),
    ],
)
def test_xml(text: str, answer: str | None, calls: list[Any]) -> None:
    check(XML, text, text if answer is None else answer, calls)


def arg_keys(line: str = "\n", **values: str) -> str:
    inside = "".join(
        f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for key, value in values.items()
    )
    return f"<tool_call>write{line}{inside}</tool_call>"


@pytest.mark.parametrize("line", ["\n", ""])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"path": "a", "mode": "5"}, {"path": "a", "mode": 5}),
        ({}, {}),
        ({"content": "\n  kept \n"}, {"content": "\n  kept \n"}),
        ({"content": "</arg_value> and <arg_key>k</arg_key>"}, None),
        ({"content": "<tool_call>f</tool_call> </arg_value>, <arg_value>"}, None),
        ({"other": '{"a": 1}'}, {"other": '{"a": 1}'}),
    ],
)
def test_arg_keys(values: dict[str, str], expected: dict[str, Any] | None, line: str) -> None:
    """As GLM writes them, with line breaks and without."""
    call = arg_keys(line, **values)
    check(
        ARG_KEYS, f"See.\n{call}\n{call}", "See.", [("write", values if expected is None else expected)] * 2
    )
    check(ARG_KEYS, f"{call} Done.", "Done.", [("write", values if expected is None else expected)])
    if values:
        check(ARG_KEYS, call.removesuffix("</tool_call>"), "", [("write", expected or values)])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>two words\n</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>{"name": "write"}</tool_call>',
        "<tool_call>write\nwords</tool_call>",
        "<tool_call>write<arg_key>a</arg_key>words</tool_call>",
        "<tool_call>write<arg_key>a</arg_key><arg_value>b",
        f"<tool_call>write<arg_key>{'k' * 600}",
        f"<tool_call>{'n' * 600}",
        "a <tool",
    ],
)
def test_what_are_no_calls_of_glm_stays_text(text: str) -> None:
    check(ARG_KEYS, text, text, [])


@pytest.mark.parametrize("form", [HERMES, XML])
def test_what_is_cut_off_is_dropped(form: CallFormat) -> None:
    call = hermes('{"content": "rm -rf /tmp/build"}') if form is HERMES else xml(content="rm -rf /tmp/build")
    inner_end = call.index("</tool_call>") - (1 if form is HERMES else len("\n</function>\n</parameter>\n"))
    for size in range(len("<tool_call>"), inner_end):
        assert parse(form, [("answer", "Now. " + call[:size])], truncated=True) == ("Now.", "", [])


def test_a_call_inside_of_thinking() -> None:
    call = hermes('{"mode": 1}')
    expected = [("write", {"mode": 1})]
    assert parse(HERMES, [("reasoning", "Hm.\n" + call)]) == ("", "Hm.", expected)
    # What goes on thinking, or answers, had only thought of it.
    thought = parse(HERMES, [("reasoning", "Hm. " + call + " or not"), ("answer", "No.")])
    assert (thought[0], thought[2]) == ("No.", [])
    assert '"mode": 1' in thought[1]
    answered = parse(HERMES, [("reasoning", call), ("answer", "Yes.")])
    assert (answered[0], answered[2]) == ("Yes.", [])


def test_a_call_of_glm_that_is_cut_off_is_dropped() -> None:
    call = arg_keys(content="rm -rf /tmp/build", path="a")
    for size in range(len("<tool_call>"), len(call) - 1):
        assert parse(ARG_KEYS, [("answer", "Now. " + call[:size])], truncated=True) == ("Now.", "", [])


WRITTEN = {HERMES: hermes, XML: xml, ARG_KEYS: arg_keys}


@pytest.mark.parametrize("form", [HERMES, XML, ARG_KEYS])
def test_long_arguments_take_linear_time(form: CallFormat) -> None:
    """Seen: 0.1 s each; what looks again at all it has takes minutes."""
    long = "x < y, " * 12_000
    for value in (long, long.replace(", ", "\n"), "<tool_call>" * 6_000, "<" * 60_000, "\n" * 60_000):
        call = hermes(json.dumps({"content": value})) if form is HERMES else WRITTEN[form](content=value)
        begin = time.process_time()
        pieces = [("answer", call[at : at + 7]) for at in range(0, len(call), 7)]
        assert parse(form, pieces)[2] == [("write", {"content": value})]
        assert time.process_time() - begin < 4


@pytest.mark.parametrize("form", [HERMES, XML, ARG_KEYS])
def test_nothing_breaks_it_and_nothing_is_lost(form: CallFormat) -> None:
    tokens = [
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "write>",
        "</function>",
        "<parameter=",
        "path>",
        "</parameter>",
        "<tool_call>write<arg_key>a</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ]
    tokens += [
        "\n",
        " ",
        "{",
        "}",
        '"',
        "\\",
        '"name": "write"',
        ', "arguments": ',
        "text",
        "[",
        "]",
        "é",
        "\0",
    ]
    for seed in range(400):
        rng = random.Random(seed)
        pieces = [rng.choice(tokens) for _ in range(rng.randint(1, 40))]
        found = parse(form, [("answer", one) for one in pieces])
        assert found == parse(form, [("answer", "".join(pieces))])
        if not found[2]:
            assert found[0] == "".join(pieces)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("1e3", {"type": "number"}, 1000.0),
        ("1_000", {"type": "number"}, "1_000"),
        ("nan", {"type": "number"}, "nan"),
        ("inf", {"type": "number"}, "inf"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("007", {"type": "string"}, "007"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("{'a': True, 'b': None}", {"type": "object"}, {"a": True, "b": None}),
        ("{'a': {1, 2}}", {"type": "object"}, "{'a': {1, 2}}"),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("[1, 2]", {"anyOf": [{"type": "array"}, {"type": "null"}]}, [1, 2]),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("5", {"enum": [1, 5]}, 5),
        ("5", {}, 5),
        ("text", {}, "text"),
        ("5", None, "5"),
        ("5", {"type": 7, "anyOf": 3, "enum": "x"}, 5),
    ],
)
def test_values_by_their_schema(text: str, schema: Any, value: Any) -> None:
    found = read_value(text, schema)
    assert found == value
    assert type(found) is type(value)
