"""Calls as LFM2 and Llama 4 write them: a list of Python calls, ``[get_weather(city="Oslo", days=2)]``, which
is read, never run."""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, Tools
from krasis.runtime.server.tools.coerce import is_json

MAX_CHARACTERS = 256 * 1024
"""Of one list: Python's parser takes some hundred times the memory of its text."""
_BEGIN = re.compile(r"\[\s*(?:[A-Za-z_][\w.\-]{0,255}\s*\(|\])")
_MIGHT = re.compile(r"\[\s*(?:[A-Za-z_][\w.\-]{0,255})?\s*\Z")
_WORDS = {"true": True, "false": False, "null": None}
_IN_TEXT = {"'": re.compile(r"['\\\n]"), '"': re.compile(r'["\\\n]')}
_TEXTS = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_DASHED = re.compile(r"[A-Za-z_][\w.]*(?:-[\w.]+)+(?=\s*[(=])")
_RESERVED = re.compile(rf"\b(?:{'|'.join(keyword.kwlist)})(?=\s*=)")
_DASH, _MADE = (
    "\u203f",
    "\u2040",
)  # in a dash's place, and behind a reserved word: Python's names have neither
_OUTSIDE = re.compile(r"[()\[\]{}'\"]")


@dataclass(slots=True)
class _ListEnd:
    """Finds the end of a list in Python text that comes in pieces, looking at each character once."""

    depth: int = 0
    quote: str = ""
    escaped: bool = False

    def find(self, text: str) -> int:
        """Behind the list's last bracket, -1 if it is not in this piece."""
        at = 0
        while at < len(text):
            if self.escaped:
                self.escaped, at = False, at + 1
                continue
            found = (_IN_TEXT[self.quote] if self.quote else _OUTSIDE).search(text, at)
            if found is None:
                return -1
            at, sign = found.end(), found.group()
            if sign == "\\":
                self.escaped = True
            elif sign == self.quote:
                self.quote = ""
            elif not self.quote and sign in _IN_TEXT:
                self.quote = sign
            elif not self.quote:
                self.depth += 1 if sign in "([{" else -1
                if self.depth <= 0:
                    return at
        return -1


class PythonicReader:
    """See ``CallReader``. It begins at the bracket. All calls are given when the list is whole."""

    __slots__ = ("_end", "_head", "_size", "_text", "calls", "rest", "state")

    def __init__(self, tools: Tools = ()) -> None:
        del tools  # every value says what it is
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._head = ""  # until it is a list of calls
        self._text: list[str] = []
        self._size = 0
        self._end = _ListEnd()

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        if not self._text:
            self._head += text
            if _BEGIN.match(self._head) is None:
                self.state = OPEN if _MIGHT.match(self._head) else BAD
                return
            text = self._head
        at = self._end.find(text)
        self._text.append(text if at < 0 else text[:at])
        self._size += len(text)
        if self._size > MAX_CHARACTERS:
            self.state = BAD
        elif at >= 0:
            self.calls = read_list("".join(self._text))
            self.state, self.rest = (DONE, text[at:]) if self.calls else (BAD, "")

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a list is whole or it is not


def read_list(text: str) -> list[Call]:
    """The calls in a list; none if it is anything else."""
    try:
        tree = ast.parse(_as_python(text), mode="eval").body
        if not isinstance(tree, ast.List) or not all(isinstance(one, ast.Call) for one in tree.elts):
            return []
        found = [_call(one) for one in tree.elts if isinstance(one, ast.Call)]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    if any(not is_json(arguments) for _, arguments in found):
        return []
    # The list is one piece of text, whatever number of calls is in it.
    raws = [text, *[""] * (len(found) - 1)]
    return [
        Call(name, json.dumps(arguments, ensure_ascii=False), raw)
        for (name, arguments), raw in zip(found, raws, strict=True)
    ]


def _as_python(text: str) -> str:
    """Line breaks in texts, and names that Python does not allow, as it has them."""

    def names(piece: str) -> str:
        piece = _DASHED.sub(lambda name: name.group().replace("-", _DASH), piece)
        return _RESERVED.sub(lambda word: word.group() + _MADE, piece)

    pieces, at = [], 0
    for found in _TEXTS.finditer(text):
        pieces.append(names(text[at : found.start()]))
        pieces.append(found.group().replace("\n", "\\n").replace("\r", "\\r"))
        at = found.end()
    return "".join([*pieces, names(text[at:])])


def _call(node: ast.Call) -> tuple[str, dict[str, Any]]:
    if node.args or any(one.arg is None for one in node.keywords):
        raise ValueError("arguments without a name")
    return _name(ast.unparse(node.func)), {_name(str(one.arg)): _value(one.value) for one in node.keywords}


def _name(text: str) -> str:
    return text.replace(_DASH, "-").replace(_MADE, "")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    return ast.literal_eval(node)


def write_list(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a list: what ``read_list`` reads."""

    def value(one: Any) -> str:
        return repr(one) if not isinstance(one, dict) else json.dumps(one, ensure_ascii=False)

    texts = [
        f"{name}({', '.join(f'{key}={value(one)}' for key, one in values.items())})" for name, values in calls
    ]
    return f"[{', '.join(texts)}]"
