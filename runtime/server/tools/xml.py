"""Calls as Qwen3-Coder and Qwen3.5 write them:

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

A value is text with a line break on either side. Markers may occur in it, so one that ends a value is known
by what follows it; a function that is written whole inside a value is counted. Models forget the first
marker, and now and then the end of a value; both are understood.
"""

from __future__ import annotations

import re

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, CallFormat, CallReader, Tools, schema_of
from krasis.runtime.server.tools.coerce import call_of_texts

OPENER, CLOSER = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MAX_NAME_CHARACTERS = 256
_IN_VALUE = re.compile(
    r"(?P<close></parameter>)|^(?P<function><function=[^<>\n]+>[ \t]*$)|^(?P<end></function>)"
    r"|^(?P<parameter><parameter=(?P<name>[^<>\n]+)>)",
    re.MULTILINE,
)


class XmlReader:
    """See ``CallReader``."""

    __slots__ = (
        *("_at", "_begin", "_depth", "_key", "_name", "_nests", "_step", "_text", "_tools", "_values"),
        *("calls", "rest", "state"),
    )

    def __init__(self, tools: Tools = (), *, nests: bool = True) -> None:
        """nests: count functions that a value contains."""
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._tools, self._nests = tools, nests
        self._text = ""
        self._at = 0  # what is before it was read
        self._begin = self._depth = 0  # of the value that is being read
        self._name = self._key = ""
        self._values: dict[str, str] = {}
        self._step = self._head

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        self._text += text
        while self.state == OPEN and self._step():
            pass

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        if self.state != OPEN:
            return
        if self._step == self._tail:
            self._finish(self._at, self._text[self._at :])
        elif self._nests and not truncated and self._step == self._value:
            again = XmlReader(self._tools, nests=False)
            again.feed(self._text)
            again.end(truncated=False)
            self.state, self.calls, self.rest = again.state, again.calls, again.rest

    def _head(self) -> bool:
        """``<function=name>``, usually behind ``<tool_call>``."""
        at = self._at
        if not at and self._text.startswith(OPENER):
            at = len(OPENER)
        body = self._text[at:].lstrip()
        if not body.startswith(FUNCTION):
            if not (FUNCTION.startswith(body) or (not at and OPENER.startswith(body))):
                self.state = BAD
            return False
        name = self._take_name(FUNCTION, len(self._text) - len(body))
        if name is None:
            return False
        self._name = name
        self._step = self._parameters
        return True

    def _parameters(self) -> bool:
        """The next parameter, or the function's end."""
        body = self._text[self._at :].lstrip()
        at = len(self._text) - len(body)
        if body.startswith(PARAMETER):
            key = self._take_name(PARAMETER, at)
            if key is None:
                return False
            self._key, self._begin, self._depth = key, self._at, 0
            self._step = self._value
            return True
        if body.startswith(END_FUNCTION):
            self._at = at + len(END_FUNCTION)
            self._step = self._tail
            return True
        if body.startswith(CLOSER):
            self._at = at
            self._step = self._tail
            return True
        if not any(one.startswith(body) for one in (PARAMETER, END_FUNCTION, CLOSER)):
            self.state = BAD
        return False

    def _take_name(self, marker: str, at: int) -> str | None:
        """The name in ``<function=name>``; None until it is there, or if it cannot be one."""
        begin = at + len(marker)
        end = self._text.find(">", begin)
        name = self._text[begin:end] if end >= 0 else self._text[begin:]
        if "\n" in name or "<" in name or len(name) > MAX_NAME_CHARACTERS or (end >= 0 and not name.strip()):
            self.state = BAD
            return None
        if end < 0:
            return None
        self._at = end + 1
        return name.strip().strip("\"'")

    def _value(self) -> bool:
        """The text up to the marker that ends it."""
        while (found := _IN_VALUE.search(self._text, self._at)) is not None:
            if self._nests and found["function"] is not None:
                if found.end() == len(self._text):  # more of the line may follow
                    return False
                self._depth += 1
            elif self._depth and found["end"] is not None:
                self._depth -= 1
            elif not self._depth:
                verdict = self._ends_value(found)
                if verdict is None:
                    self._at = found.start()
                    return False
                if verdict:
                    return True
            self._at = found.end()
        # A marker may have begun in the last line; of a long line, only near its end.
        line = self._text.rfind("\n", self._at) + 1
        self._at = max(line, self._at, len(self._text) - MAX_NAME_CHARACTERS - len(PARAMETER) - 1)
        return False

    def _ends_value(self, found: re.Match[str]) -> bool | None:
        """Whether a marker ends the value; None if that is not yet known."""
        if found["close"] is not None:
            after = self._text[found.end() :].lstrip()
            if after.startswith((PARAMETER, END_FUNCTION, CLOSER)):
                return self._keep_value(found.start(), found.end())
            could = any(one.startswith(after) for one in (PARAMETER, END_FUNCTION, CLOSER))
            return None if could else False
        if found["end"] is not None:  # the end of the value was forgotten
            after = self._text[found.end() :].lstrip()
            if after.startswith(CLOSER):
                return self._keep_value(found.start(), found.start())
            return None if CLOSER.startswith(after) else False
        if found["parameter"] is not None and self._is_next(found["name"].strip()):
            return self._keep_value(found.start(), found.start())
        return False

    def _is_next(self, name: str) -> bool:
        """Whether the tool has such a parameter, and it was not given yet."""
        schema = schema_of(self._tools, self._name) or {}
        known = schema.get("properties")
        return isinstance(known, dict) and name in known and name not in self._values and name != self._key

    def _keep_value(self, end: int, behind: int) -> bool:
        self._values[self._key] = self._text[self._begin : end].removeprefix("\n").removesuffix("\n")
        self._at = behind
        self._step = self._parameters
        return True

    def _tail(self) -> bool:
        """The closing marker; whatever else comes instead belongs to what follows."""
        tail = self._text[self._at :]
        bare = tail.lstrip()
        if bare.startswith(CLOSER):
            self._finish(len(self._text) - len(bare) + len(CLOSER), bare[len(CLOSER) :])
        elif not CLOSER.startswith(bare):
            self._finish(self._at, tail)
        return False

    def _finish(self, end: int, rest: str) -> None:
        self.calls.append(call_of_texts(self._name, self._values, self._tools, self._text[:end]))
        self.state, self.rest = DONE, rest


def _reader(tools: Tools) -> CallReader:
    return XmlReader(tools)


XML = CallFormat("xml", (OPENER, FUNCTION), _reader)
