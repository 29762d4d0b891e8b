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
    all. id: the one that the model gave it, if its format has such."""

    name: str
    arguments: str
    raw: str
    id: str = ""


class CallReader(Protocol):
    """Reads from an opening marker on, in pieces of any size: one call, or several in formats that put a
    marker around all of them.

    state: ``open`` until there are calls and no more can follow (``done``), or none can come of it
    (``bad``). calls: those that are whole, one after the other.
    """

    state: str
    calls: list[Call]
    rest: str

    def feed(self, text: str) -> None:
        """Takes more text. Once done, ``rest`` is what followed the last call."""

    def end(self, *, truncated: bool) -> None:
        """No more text comes: done if there is a whole call. truncated: the text was cut off, so that
        nothing that is missing is forgiven."""


Writer = Callable[[Sequence[tuple[str, Any]]], str]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One family's form of calls. openers: what begins one. reader: makes a reader for the tools offered.
    at_start: what begins one where nothing was said before. ids: how ids must look that a template writes
    down: ``numbered`` (``functions.NAME:0``), ``nine`` (letters and digits), empty: they do not matter.
    write: what the model would write for calls (name, arguments), for templates that cannot."""

    name: str
    openers: tuple[str, ...]
    reader: Callable[[Tools], CallReader]
    at_start: tuple[str, ...] = ()
    ids: str = ""
    write: Writer | None = None


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


def overlap(text: str, marker: str) -> int:
    """The longest end of text that begins marker."""
    return next(
        (size for size in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-size:])), 0
    )


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
