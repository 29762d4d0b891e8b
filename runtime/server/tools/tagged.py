"""Calls whose arguments stand one by one between markers, as GLM, MiniMax and DeepSeek-V3.2 write them:

    <tool_call>name
    <arg_key>key</arg_key>
    <arg_value>value</arg_value>
    </tool_call>

Texts are written as they are, other values as JSON. A value may contain markers: one that ends it is known by
what follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, Tools, overlap
from krasis.runtime.server.tools.coerce import call_of_texts

MAX_NAME_CHARACTERS = 256
_NAME = re.compile(r"[^\s<>{}\"]+\Z")
_KEY = re.compile(
    r"(?P<quote>[\"']?)(?P<key>.*?)(?P=quote)(?:\s+string=[\"'](?P<is_text>true|false)[\"'])?\Z", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Tags:
    """The markers. name_end: behind the name; without one it ends where a marker begins. value: between a key
    and its value, if there is anything. says_text: keys say whether their value is text."""

    opener: str
    key: str
    key_end: str
    value_end: str
    closer: str
    name_end: str = ""
    value: str = ""
    says_text: bool = False


class TaggedReader:
    """See ``CallReader``."""

    __slots__ = (
        *("_at", "_begin", "_key", "_name", "_step", "_tags", "_text", "_tools", "_values"),
        *("calls", "rest", "state", "_plain"),
    )

    def __init__(self, tags: Tags, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._tags, self._tools = tags, tools
        self._text = ""
        self._at = self._begin = 0  # what is before _at was read; where the value begins
        self._name = self._key = ""
        self._values: dict[str, str] = {}
        self._plain: dict[str, bool] = {}  # key -> whether its value is text, where the model says so
        self._step = self._head

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        self._text += text
        while self.state == OPEN and self._step():
            pass

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``: behind a value, the last marker may be missing."""
        if self.state != OPEN or truncated or self._step != self._value:
            return
        size = len(self._tags.value_end)
        end = self._text.find(self._tags.value_end, self._at)
        if end >= 0 and not self._text[end + size :].strip():
            self._keep(end, end + size)
            self._finish(self._at, self._text[self._at :])

    def _head(self) -> bool:
        """The name."""
        begin, mark = len(self._tags.opener), self._tags.name_end
        if len(self._text) < begin:
            return False
        at = self._text.find(mark or "<", begin)
        end = at if at >= 0 else len(self._text) - overlap(self._text[begin:], mark)
        name = self._text[begin:end].strip().strip("\"'")
        if (name and not _NAME.match(name)) or len(name) > MAX_NAME_CHARACTERS or (at >= 0 and not name):
            self.state = BAD
        if at < 0 or self.state == BAD:
            return False
        self._name, self._at, self._step = name, at + len(mark), self._next
        return True

    def _next(self) -> bool:
        """The next key, or the end of the call."""
        key, key_end = self._tags.key, self._tags.key_end
        marker = self._marker(self._at, self._tags.closer, key)
        if marker is None:
            return False
        at = self._text.index(marker, self._at) + len(marker)
        if marker == self._tags.closer:
            self._finish(at, self._text[at:])
            return False
        end = self._text.find(key_end, at)
        if end < 0:
            self.state = BAD if len(self._text) - at > MAX_NAME_CHARACTERS + len(key_end) else OPEN
            return False
        self._take_key(self._text[at:end].strip())
        self._at, self._step = end + len(key_end), self._before_value
        return True

    def _take_key(self, written: str) -> None:
        found = _KEY.match(written) if self._tags.says_text or not self._tags.value else None
        self._key = written if found is None else found["key"]
        if found is not None and found["is_text"] is not None:
            self._plain[self._key] = found["is_text"] == "true"

    def _before_value(self) -> bool:
        mark = self._tags.value
        if mark:
            if self._marker(self._at, mark) is None:
                return False
            self._at = self._text.index(mark, self._at) + len(mark)
        self._begin, self._step = self._at, self._value
        return True

    def _value(self) -> bool:
        """The text up to the marker that ends it."""
        mark, followers = self._tags.value_end, (self._tags.key, self._tags.closer)
        while (end := self._text.find(mark, self._at)) >= 0:
            behind = end + len(mark)
            after = self._text[behind : behind + MAX_NAME_CHARACTERS].lstrip()
            if after.startswith(followers):
                self._keep(end, behind)
                return True
            if any(one.startswith(after) for one in followers):
                self._at = end
                return False
            self._at = behind
        self._at = max(self._at, len(self._text) - len(mark) + 1)
        return False

    def _keep(self, end: int, behind: int) -> None:
        self._values[self._key] = self._text[self._begin : end]
        self._at, self._step = behind, self._next

    def _marker(self, at: int, *markers: str) -> str | None:
        """The one that comes next behind blanks; None until it is there, or if something else is."""
        body = self._text[at : at + MAX_NAME_CHARACTERS].lstrip()
        found = next((one for one in markers if body.startswith(one)), None)
        if found is None and not any(one.startswith(body) for one in markers):
            self.state = BAD
        return found

    def _finish(self, end: int, rest: str) -> None:
        raw = self._text[:end]
        self.calls.append(call_of_texts(self._name, self._values, self._tools, raw, self._plain))
        self.state, self.rest = DONE, rest
