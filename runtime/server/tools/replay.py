"""Calls of tools that come back in a conversation are written as the model wrote them.

Clients write the arguments anew (other blanks, other escapes), and a template writes them its own way; each
changed character would make everything behind it be computed again. So every call has an id that nobody can
guess, and the server remembers what was sampled for it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import OrderedDict, deque
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
        known = [found for row in rows for one in row.get("tool_calls") or () if (found := self._known(one))]
        wanted = _Wanted(known)
        openers = re.compile("|".join(map(re.escape, (*call_format.openers, *call_format.at_start))))
        pieces: list[str] = []
        cursor, begin = 0, _find_any(text, openers, 0) if known else -1
        while begin >= 0:
            behind = begin + 1  # what was read and is not known may be words, and is read again
            for place, end, written in _places(text, begin, cursor, openers, wanted, call_format, tools):
                pieces += [text[cursor:place], written]
                cursor = behind = end
            begin = _find_any(text, openers, behind)
        return "".join([*pieces, text[cursor:]])

    def _known(self, call: Mapping[str, Any]) -> Call | None:
        number = call.get("id")
        return self.find(number) if isinstance(number, str) else None


def _size(call: Call) -> int:
    return 2 * (len(call.raw) + len(call.arguments)) + 256


def _as_written(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that were written as one piece of text, together."""
    groups: list[list[Call]] = []
    for call in calls:
        if call.raw or not groups:
            groups.append([call])
        else:
            groups[-1].append(call)
    return groups


def _places(
    text: str,
    begin: int,
    cursor: int,
    openers: re.Pattern[str],
    wanted: _Wanted,
    call_format: CallFormat,
    tools: Tools,
) -> list[tuple[int, int, str]]:
    """(begin, end, the model's own writing) of the known calls from an opener on."""
    calls, is_sure = _read(text, begin, openers, call_format, tools)
    groups, at, found = _as_written(calls), begin, []
    if not is_sure and not wanted.knows(groups):
        return []  # an example without an end, which a call behind it seemed to end
    for group in groups:
        place = text.find(group[0].raw, max(cursor, at))
        written = wanted.take(group) if place >= 0 else None
        at = max(at, place + len(group[0].raw))
        if written is not None:
            found.append((place, at, written))
    return found


def _read(
    text: str, begin: int, openers: re.Pattern[str], call_format: CallFormat, tools: Tools
) -> tuple[list[Call], bool]:
    """The calls from an opener on, and whether they end before the next one."""
    end = _find_any(text, openers, begin + 1)
    # Further markers inside its arguments: a longer piece is tried, up to a few.
    for attempt in range(4):
        reader = call_format.reader(tools)
        reader.feed(text[begin:] if end < 0 else text[begin:end])
        reader.end(truncated=False)
        if reader.state == DONE:
            return reader.calls, attempt == 0
        if end < 0:
            break
        end = _find_any(text, openers, end + 1)
    return [], False


def _find_any(text: str, openers: re.Pattern[str], begin: int) -> int:
    found = openers.search(text, begin)
    return -1 if found is None else found.start()


class _Wanted:
    """What the model wrote, in the order of the conversation."""

    __slots__ = ("_groups", "_next", "_places")

    def __init__(self, calls: Sequence[Call]) -> None:
        self._groups = _as_written(calls)
        self._next = 0
        self._places: dict[tuple[str, ...], deque[int]] = {}
        for index, group in enumerate(self._groups):
            self._places.setdefault(_meaning(group), deque()).append(index)

    def knows(self, groups: Sequence[list[Call]]) -> bool:
        """Whether all of these are among those that come."""
        return all(places and places[-1] >= self._next for places in map(self._places_of, groups))

    def _places_of(self, found: list[Call]) -> deque[int]:
        return self._places.get(_meaning(found), deque())

    def take(self, found: list[Call]) -> str | None:
        """How the model wrote the next calls that say the same."""
        places = self._places_of(found)
        while places and places[0] < self._next:
            places.popleft()
        if not places:
            return None
        self._next = places.popleft() + 1
        return self._groups[self._next - 1][0].raw


def _meaning(calls: Sequence[Call]) -> tuple[str, ...]:
    """The same for calls of the same names with equal arguments, however those are written."""
    texts: list[str] = []
    for call in calls:
        try:
            value = json.dumps(_with_integers(strict_json(call.arguments)), sort_keys=True)
        except (NotJsonError, RecursionError):
            value = call.arguments
        texts += [call.name, value]
    return tuple(texts)


def _with_integers(value: Any) -> Any:
    """1.0 as 1: some clients know no difference."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_integers(one) for one in value]
    if isinstance(value, dict):
        return {key: _with_integers(one) for key, one in value.items()}
    return value
