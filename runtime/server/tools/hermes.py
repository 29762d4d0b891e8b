"""Calls as Hermes and Qwen3 write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

The end of a call is where its JSON ends, so that markers inside its strings are what they are: text.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, CallFormat, CallReader, Tools
from krasis.runtime.server.tools.json_object import JsonEnd, read_call

OPENER, CLOSER = "<tool_call>", "</tool_call>"


class HermesReader:
    """See ``CallReader``."""

    __slots__ = ("_call", "_end", "_head", "_pieces", "_tail", "calls", "rest", "state")

    def __init__(self, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._call: Call | None = None
        self._head: str | None = ""  # until the object begins
        self._pieces: list[str] = []
        self._end = JsonEnd()
        self._tail: str | None = None  # what follows the object

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        if self._head is not None:
            begun = self._begin(self._head + text)
            if begun is None:
                return
            text = begun
        if self._tail is None:
            at = self._end.find(text)
            if at < 0:
                self._pieces.append(text)
                return
            self._pieces.append(text[:at])
            self._tail, text = "", text[at:]
            self._take_object()
            if self.state != OPEN:
                return
        self._close(self._tail + text)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a JSON object is whole or it is not
        if self.state == OPEN and self._tail is not None:
            self._finish("")

    def _begin(self, text: str) -> str | None:
        """Looks for the brace behind the marker; gives it and what follows, None without one."""
        self._head = text
        if len(text) < len(OPENER):
            return None
        body = text[len(OPENER) :].lstrip()
        if not body:
            return None
        if body[0] != "{":
            self.state = BAD
            return None
        self._pieces.append(text[: len(text) - len(body)])
        self._head = None
        return body

    def _take_object(self) -> None:
        """The object is complete: a call, or not."""
        written = "".join(self._pieces)
        self._call = read_call(written[len(OPENER) :].lstrip(), written)
        if self._call is None:
            self.state = BAD

    def _close(self, tail: str) -> None:
        """Waits for the closing marker; whatever else comes instead belongs to what follows."""
        self._tail = tail
        bare = tail.lstrip()
        if bare.startswith(CLOSER):
            blanks = len(tail) - len(bare)
            self._finish(tail[: blanks + len(CLOSER)])
            self.rest = bare[len(CLOSER) :]
        elif not CLOSER.startswith(bare):
            self._finish("")
            self.rest = tail

    def _finish(self, closing: str) -> None:
        if self._call is not None:
            self.calls.append(replace(self._call, raw=self._call.raw + closing))
            self.state = DONE


def _reader(tools: Tools) -> CallReader:
    return HermesReader(tools)


HERMES = CallFormat("hermes", (OPENER,), _reader)
