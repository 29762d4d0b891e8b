"""Calls as MiniMax-M3 writes them: an element for each value, its tags behind a sign that no text has:

    ]<]minimax[>[<invoke name="f">]<]minimax[>[<city>Oslo]<]minimax[>[</city>]<]minimax[>[</invoke>

Objects hold elements named as their keys, lists elements named ``item``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, Tools, schema_of
from krasis.runtime.server.tools.coerce import read_value

SIGN = "]<]minimax[>["
OPENER, CLOSER = f"{SIGN}<invoke name=", f"{SIGN}</invoke>"
MAX_DEPTH = 64
_HEAD = re.compile(re.escape(OPENER) + r"[\"']?(?P<name>[^\s<>\"']{1,256})[\"']?>")
_TAG = re.compile(r"<(?P<end>/?)(?P<name>[^<>/][^<>]{0,255})>")


@dataclass(slots=True)
class _Element:
    name: str
    text: str = ""
    children: list[_Element] = field(default_factory=list)


class NestedTagReader:
    """See ``CallReader``."""

    __slots__ = ("_at", "_text", "_tools", "calls", "rest", "state")

    def __init__(self, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._tools = tools
        self._text = ""
        self._at = 0

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        self._text += text
        if not self._at:
            found = _HEAD.match(self._text)
            if found is None:
                is_long = len(self._text) > len(OPENER) + 300 or "\n" in self._text[len(OPENER) :]
                self.state = BAD if is_long else OPEN
                return
            self._at = found.end()
        end = self._text.find(CLOSER, self._at)
        if end >= 0:
            self._finish(end)
        else:
            self._at = max(self._at, len(self._text) - len(CLOSER) + 1)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a call without its end is none

    def _finish(self, end: int) -> None:
        found = _HEAD.match(self._text)
        elements = None if found is None else _read_elements(self._text[found.end() : end])
        if found is None or elements is None:
            self.state = BAD
            return
        name, behind = found["name"], end + len(CLOSER)
        values = _object(elements, schema_of(self._tools, name))
        self.calls.append(Call(name, json.dumps(values, ensure_ascii=False), self._text[:behind]))
        self.state, self.rest = DONE, self._text[behind:]


def _read_elements(text: str) -> list[_Element] | None:
    """The outermost elements; None for tags that do not fit each other."""
    root = _Element("")
    path = [root]
    first, *pieces = text.split(SIGN)
    if first.strip():
        return None
    for piece in pieces:
        found = _TAG.match(piece)
        if found is None:
            return None
        behind = piece[found.end() :]
        if found["end"]:
            if len(path) == 1 or path[-1].name != found["name"] or behind.strip():
                return None
            path.pop()
            continue
        element = _Element(found["name"], behind)
        path[-1].children.append(element)
        path.append(element)
        if len(path) > MAX_DEPTH:
            return None
    return root.children if len(path) == 1 else None


def _object(elements: list[_Element], schema: object) -> dict[str, Any]:
    known = schema.get("properties") if isinstance(schema, Mapping) else None
    found = known if isinstance(known, Mapping) else {}
    return {one.name: _value(one, found.get(one.name)) for one in elements}


def _value(element: _Element, schema: object) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if element.children:
        if kind != "object" and all(one.name == "item" for one in element.children):
            items = schema.get("items") if isinstance(schema, Mapping) else None
            return [_value(one, items) for one in element.children]
        return _object(element.children, schema)
    if not element.text and kind in ("array", "object"):
        return [] if kind == "array" else {}
    return read_value(element.text, schema)
