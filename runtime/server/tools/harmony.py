"""Calls as gpt-oss writes them (harmony): a message to ``functions.NAME`` in the channel commentary, with the
arguments as its text:

    <|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{...}<|call|>

The recipient may stand behind the channel, too. ``<|start|>assistant`` is left out before, ``<|call|>`` ends
the answer, and the word json (behind ``<|constrain|>``, which decoding leaves out) may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from krasis.runtime.server.tools.calls import (
    BAD,
    DONE,
    OPEN,
    Call,
    CallFormat,
    CallReader,
    NotJsonError,
    Tools,
    strict_json,
)
from krasis.runtime.server.tools.json_object import JsonEnd

RECIPIENT, MESSAGE = "to=functions.", "<|message|>"
MAX_HEAD_CHARACTERS = 512
_HEAD = re.compile(
    r"(?:<\|channel\|>(?:commentary|analysis) )?to=functions\.(?P<name>[^\s<>]+)"
    r"\s*(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>)?\s*(?:json)?\s*"
)


class HarmonyReader:
    """See ``CallReader``."""

    __slots__ = ("_body", "_end", "_head", "_name", "calls", "rest", "state")

    def __init__(self) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._head, self._name = "", ""  # until the message begins; whose call it is from there
        self._body: list[str] = []
        self._end = JsonEnd()

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        if not self._name:
            text = self._take_head(text)
        if not self._name or not text:
            return
        if not self._body:
            text = text.lstrip()
            if text[:1] not in ("", "{"):
                self.state = BAD
                return
        at = self._end.find(text)
        self._body.append(text if at < 0 else text[:at])
        if at >= 0:
            self._finish(text[at:])

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a JSON object is whole or it is not

    def _take_head(self, text: str) -> str:
        """Reads up to the message; gives what is behind."""
        self._head += text
        at = self._head.find(MESSAGE)
        if at < 0:
            self.state = BAD if len(self._head) > MAX_HEAD_CHARACTERS else OPEN
            return ""
        found = _HEAD.fullmatch(self._head[:at])
        if found is None:
            self.state = BAD
            return ""
        body = self._head[at + len(MESSAGE) :]
        self._head, self._name = self._head[: at + len(MESSAGE)], found["name"]
        return body

    def _finish(self, rest: str) -> None:
        body = "".join(self._body)
        try:
            value = strict_json(body)
        except NotJsonError:
            value = None
        if not isinstance(value, Mapping):
            self.state = BAD
            return
        self.calls.append(Call(self._name, json.dumps(value, ensure_ascii=False), self._head + body))
        self.state, self.rest = DONE, rest


def _reader(tools: Tools) -> CallReader:
    del tools
    return HarmonyReader()


HARMONY = CallFormat(
    "harmony",
    (RECIPIENT, f"<|channel|>commentary {RECIPIENT}", f"<|channel|>analysis {RECIPIENT}"),
    _reader,
)
