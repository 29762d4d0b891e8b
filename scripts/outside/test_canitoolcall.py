"""canitoolcall's recorded outputs, by the parsers of krasis-serve: whole, and in every split it knows.

pip install canitoolcall==0.1.1
pytest scripts/outside/test_canitoolcall.py --canitoolcall-family qwen3-hermes --canitoolcall-family qwen3-xml
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from canitoolcall.pytest_plugin import assert_conforms, assert_equivalent
from canitoolcall.results import ParsedToolCall, ParseResult

from krasis.runtime.server.tools.calls import Call
from krasis.runtime.server.tools.hermes import HERMES
from krasis.runtime.server.tools.splitter import CallSplitter
from krasis.runtime.server.tools.xml import XML
from krasis.runtime.text.thinking import _THINK, ThinkingSplitter


def parse(fixture: Any, pieces: list[str]) -> ParseResult:
    opened = _THINK if (fixture.generation_prompt or "").rstrip().endswith("<think>") else None
    thinking = ThinkingSplitter((_THINK,), opened)
    tools = list(fixture.tools or [])
    calls = CallSplitter(XML if fixture.family == "qwen3-xml" else HERMES, tools)
    parts = []
    for piece in pieces:
        for segment in thinking.push(piece):
            parts += calls.push(segment.kind, segment.text)
    for segment in thinking.finish():
        parts += calls.push(segment.kind, segment.text)
    parts += calls.finish(truncated=fixture.expected_error is not None or "truncated" in fixture.tags)
    texts = {"answer": "", "reasoning": ""}
    for part in parts:
        if not isinstance(part, Call):
            texts[part.kind] += part.text
    found = tuple(ParsedToolCall(part.name, part.arguments) for part in parts if isinstance(part, Call))
    return ParseResult(texts["answer"] or None, texts["reasoning"] or None, found)


def splits(text: str) -> list[list[str]]:
    """Characters, words with their blanks, markers whole, and random cuts."""
    ways = [list(text), re.findall(r"\S+\s*|\s+", text), re.split(r"(</?(?:tool_call|think)>)", text)]
    for seed in range(5):
        rng, pieces, rest = random.Random(seed), [], text
        while rest:
            size = rng.randint(1, 24)
            pieces.append(rest[:size])
            rest = rest[size:]
        ways.append(pieces)
    return ways


def test_conformance(canitoolcall_fixture: Any) -> None:
    whole = parse(canitoolcall_fixture, [canitoolcall_fixture.raw_output])
    assert_conforms(canitoolcall_fixture, whole)
    for pieces in splits(canitoolcall_fixture.raw_output):
        streamed = parse(canitoolcall_fixture, pieces)
        assert_conforms(canitoolcall_fixture, streamed)
        assert_equivalent(whole, streamed)
    for call in whole.tool_calls:
        json.loads(call.arguments_raw or "")
