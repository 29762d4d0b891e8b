"""Calls that are a name and JSON arguments between markers, as DeepSeek-V3, Kimi-K2 and Mistral write them:

    <|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>

The end of the arguments is where their JSON ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, NotJsonError, strict_json
from krasis.runtime.server.tools.json_object import JsonEnd

MAX_HEAD_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class NamedForm:
    """head: what stands between the opener and the arguments; its groups are ``name`` and, if there are such,
    ``id``. closes: what may end a call; without any it ends with its arguments."""

    opener: str
    head: re.Pattern[str]
    closes: tuple[str, ...] = ()


class NamedJsonReader:
    """See ``CallReader``."""

    __slots__ = ("_body", "_end", "_form", "_found", "_head", "_tail", "calls", "rest", "state")

    def __init__(self, form: NamedForm) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._form = form
        self._head = ""
        self._found: re.Match[str] | None = None  # of the whole head
        self._body: list[str] = []
        self._end = JsonEnd()
        self._tail: str | None = None  # what follows the arguments

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        if self._found is None:
            text = self._take_head(text)
        if self._found is None or self.state != OPEN:
            return
        if self._tail is None:
            at = self._end.find(text)
            self._body.append(text if at < 0 else text[:at])
            if at < 0:
                return
            self._tail, text = "", text[at:]
        self._close(self._tail + text)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``: the last marker may be missing."""
        del truncated  # a JSON object is whole or it is not
        if self.state == OPEN and self._tail is not None:
            self._finish("", self._tail if self._tail.strip(" \n\t`") else "")

    def _take_head(self, text: str) -> str:
        """Reads up to the arguments; gives what is behind."""
        self._head += text
        size = len(self._form.opener)
        at = self._head.find("{", size)
        closed = min(
            (place for one in self._form.closes if (place := self._head.find(one, size)) >= 0), default=-1
        )
        if closed >= 0 and (at < 0 or closed < at):  # no arguments
            at, self._tail = closed, ""
        if at < 0:
            self.state = BAD if len(self._head) > MAX_HEAD_CHARACTERS else OPEN
            return ""
        self._found = self._form.head.fullmatch(self._head, size, at)
        if self._found is None:
            self.state = BAD
            return ""
        self._head, body = self._head[:at], self._head[at:]
        return body

    def _close(self, tail: str) -> None:
        """Waits for the closing marker; whatever else comes instead belongs to what follows."""
        self._tail = tail
        bare = tail.lstrip()
        found = next((one for one in self._form.closes if bare.startswith(one)), None)
        if found is not None:
            size = len(tail) - len(bare) + len(found)
            self._finish(tail[:size], tail[size:])
        elif not any(one.startswith(bare) for one in self._form.closes):
            self._finish("", tail)

    def _finish(self, closing: str, rest: str) -> None:
        body = "".join(self._body)
        try:
            value = strict_json(body) if body else {}
        except NotJsonError:
            value = None
        if self._found is None or not isinstance(value, Mapping):
            self.state = BAD
            return
        groups = self._found.groupdict()
        written = body if _has_each_key_once(body) else json.dumps(value, ensure_ascii=False)
        self.calls.append(
            Call(groups["name"], written or "{}", self._head + body + closing, groups.get("id") or "")
        )
        self.state, self.rest = DONE, rest


def _has_each_key_once(text: str) -> bool:
    """Whether no object names a key twice, so that every reader understands the same."""
    is_once = True

    def take(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal is_once
        found = dict(pairs)
        is_once = is_once and len(found) == len(pairs)
        return found

    if text:
        json.loads(text, object_pairs_hook=take)
    return is_once
