"""Where a model's thoughts go in an answer of chat: llama.cpp's ``reasoning_format``."""

from __future__ import annotations

from krasis.runtime.server.fields import Fields
from krasis.runtime.server.tools.calls import Text
from krasis.runtime.server.tools.splitter import Part
from krasis.runtime.text.thinking import ANSWER, REASONING

APART, IN_TEXT, BOTH = "deepseek", "none", "deepseek-legacy"
FORMS = ("auto", APART, IN_TEXT, BOTH)
# Whatever the model's own markers are: these are what clients look for.
_OPENS, _CLOSES = "<think>\n", "\n</think>\n\n"


def read_form(fields: Fields, default: str) -> str:
    """The request's form, or the server's. Raises ApiError."""
    form = fields.text("reasoning_format", default) or default
    if form not in FORMS:
        raise fields.wrong("reasoning_format", f"one of {', '.join(FORMS)}")
    return APART if form == "auto" else form


class ThoughtForm:
    """Puts the thoughts of one answer where form says: ``deepseek``: apart from the answer; ``none``: in its
    text, between ``<think>`` and ``</think>``; ``deepseek-legacy``: both."""

    __slots__ = ("_form", "_is_open")

    def __init__(self, form: str) -> None:
        self._form, self._is_open = form, False

    def push(self, part: Part) -> list[Part]:
        """What becomes of a part. Thoughts that are cut off stay open."""
        if self._form == APART:
            return [part]
        if isinstance(part, Text) and part.kind == REASONING:
            begin, self._is_open = "" if self._is_open else _OPENS, True
            shown = Text(ANSWER, begin + part.text)
            return [part, shown] if self._form == BOTH else [shown]
        if self._is_open:
            self._is_open = False
            return [Text(ANSWER, _CLOSES), part]
        return [part]
