"""What a model's text is made of: words, and calls of tools; and how a format of calls is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Tools = Sequence[Mapping[str, Any]]

OPEN, DONE, BAD = "open", "done", "bad"


@dataclass(frozen=True, slots=True)
class Text:
    """Words. kind: ``answer`` or ``reasoning``."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call. arguments: a JSON object as text. raw: exactly what the model wrote, markers and
    all."""

    name: str
    arguments: str
    raw: str


class CallReader(Protocol):
    """Reads one call from its opening marker on, in pieces of any size.

    state: ``open`` until the text so far is a call (``done``) or can no longer become one (``bad``).
    """

    state: str
    call: Call | None
    rest: str

    def feed(self, text: str) -> None:
        """Takes more text. Once done, ``rest`` is what followed the call."""

    def end(self, *, truncated: bool) -> None:
        """No more text comes: done if what is there is a whole call. truncated: the text was cut off, so that
        nothing that is missing is forgiven."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One family's form of calls. openers: what begins one. reader: makes a reader for the tools offered."""

    name: str
    openers: tuple[str, ...]
    reader: Callable[[Tools], CallReader]


class NotJsonError(ValueError):
    """Text that strict JSON does not know: NaN, a number beyond every float, nesting without end."""


def strict_json(text: str) -> Any:
    """JSON's value. Raises NotJsonError for anything that another JSON reader might refuse."""

    def refuse(word: str) -> Any:
        raise NotJsonError(word)

    def number(word: str) -> float:
        value = float(word)
        if value in (float("inf"), float("-inf")):
            raise NotJsonError(word)
        return value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a tool that has name and parameters: OpenAI's ``function``, or the tool itself."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def schema_of(tools: Tools, name: str) -> Mapping[str, Any] | None:
    """The JSON schema of a tool's arguments; None for a tool that was not offered or has none."""
    for tool in tools:
        function = function_of(tool)
        if function.get("name") == name:
            schema = function.get("parameters", function.get("input_schema"))
            return schema if isinstance(schema, Mapping) else None
    return None
