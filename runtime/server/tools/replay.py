"""Calls of tools that come back in a conversation are written as the model wrote them.

Clients write the arguments anew (other blanks, other escapes), and a template writes them its own way; each
changed character would make everything behind it be computed again. So every call has an id that nobody can
guess, and the server remembers what was sampled for it.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from krasis.runtime.server.tools.calls import (
    DONE,
    Call,
    CallFormat,
    NotJsonError,
    Tools,
    strict_json,
)

MAX_BYTES = 64 * 2**20


class Replay:
    """Id -> the call, the oldest forgotten beyond max_bytes. Any thread may call."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._calls: OrderedDict[str, Call] = OrderedDict()
        self._lock = Lock()
        self._max_bytes, self._bytes = max_bytes, 0

    def remember(self, call: Call, prefix: str = "call_") -> str:
        """The call's new id."""
        number = prefix + secrets.token_hex(12)
        with self._lock:
            self._calls[number] = call
            self._bytes += _size(call)
            while self._bytes > self._max_bytes and len(self._calls) > 1:
                _, old = self._calls.popitem(last=False)
                self._bytes -= _size(old)
        return number

    def find(self, number: str) -> Call | None:
        """The call with that id."""
        with self._lock:
            found = self._calls.get(number)
            if found is not None:
                self._calls.move_to_end(number)
            return found

    def restored(
        self, text: str, rows: Sequence[Mapping[str, Any]], call_format: CallFormat, tools: Tools
    ) -> str:
        """A rendered conversation with each remembered call in the model's own writing.

        A call whose arguments a client has really changed stays as it is rendered.
        """
        wanted = [found for row in rows for one in row.get("tool_calls") or () if (found := self._known(one))]
        pieces: list[str] = []
        cursor = 0
        for call in wanted:
            place = _find_call(text, cursor, call, call_format, tools)
            if place is None:
                continue
            begin, end = place
            pieces += [text[cursor:begin], call.raw]
            cursor = end
        return "".join([*pieces, text[cursor:]])

    def _known(self, call: Mapping[str, Any]) -> Call | None:
        number = call.get("id")
        return self.find(number) if isinstance(number, str) else None


def _size(call: Call) -> int:
    return 2 * (len(call.raw) + len(call.arguments)) + 256


def _find_call(
    text: str, cursor: int, call: Call, call_format: CallFormat, tools: Tools
) -> tuple[int, int] | None:
    """Where a call with this name and these arguments stands in a rendered conversation."""
    opener = call_format.openers[0]
    begin = text.find(opener, cursor)
    while begin >= 0:
        reader = call_format.reader(tools)
        end = text.find(opener, begin + len(opener))
        # Further markers inside its arguments: a longer piece is tried, up to a few.
        for _ in range(4):
            piece = text[begin:] if end < 0 else text[begin:end]
            reader = call_format.reader(tools)
            reader.feed(piece)
            reader.end(truncated=False)
            if reader.state == DONE or end < 0:
                break
            end = text.find(opener, end + len(opener))
        found = reader.call
        if reader.state == DONE and found is not None and _same(found, call):
            return begin, begin + len(found.raw)
        begin = text.find(opener, begin + len(opener))
    return None


def _same(one: Call, other: Call) -> bool:
    if one.name != other.name:
        return False
    try:
        return bool(strict_json(one.arguments) == strict_json(other.arguments))
    except NotJsonError:
        return False
