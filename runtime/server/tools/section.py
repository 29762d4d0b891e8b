"""Several calls between two markers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import whitespace

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, CallReader, Tools


@dataclass(frozen=True, slots=True)
class Section:
    """opens: any of these begins it. closes: ends it. item_opens: what begins a call. item: makes its reader,
    which gets the text from there on. signs: what may stand between calls, beside blanks."""

    opens: tuple[str, ...]
    closes: str
    item_opens: str
    item: Callable[[Tools], CallReader]
    signs: str = ""


class SectionReader:
    """See ``CallReader``. Calls come as they are whole. Where something else follows, the section ends."""

    __slots__ = ("_item", "_section", "_text", "_tools", "_was_opened", "_written", "calls", "rest", "state")

    def __init__(self, section: Section, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._section, self._tools = section, tools
        self._was_opened = False
        self._text = ""  # in front of a call
        self._item: CallReader | None = None
        self._written = ""  # what its reader was given

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        while self.state == OPEN and text:
            text = self._between(text) if self._item is None else self._inside(self._item, text)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        if self.state != OPEN:
            return
        if self._item is not None:
            self._item.end(truncated=truncated)
            self._text = self._take(self._item) if self._item.state == DONE else self._written
        if self.calls:
            self._finish("" if truncated or self._is_blank(self._text) else self._text)

    def _between(self, text: str) -> str:
        """Looks for a call or the end of the section; gives what belongs to a call."""
        self._text += text
        if not self._was_opened:
            opened = next((one for one in self._section.opens if self._text.startswith(one)), None)
            if opened is None:
                return ""
            self._was_opened, self._text = True, self._text[len(opened) :]
        bare = self._text.lstrip(whitespace + self._section.signs)
        if bare.startswith(self._section.item_opens):
            self._item, self._text, self._written = self._section.item(self._tools), "", ""
            return bare
        if bare.startswith(self._section.closes):
            if self.calls:
                self._finish(bare[len(self._section.closes) :])
            else:
                self.state = BAD
        elif not any(one.startswith(bare) for one in (self._section.item_opens, self._section.closes)):
            self._stop(self._text)
        return ""

    def _inside(self, item: CallReader, text: str) -> str:
        self._written += text
        item.feed(text)
        if item.state == BAD:
            self._stop(self._written)
        return self._take(item) if item.state == DONE else ""

    def _take(self, item: CallReader) -> str:
        self.calls += item.calls
        self._item, self._written = None, ""
        return item.rest

    def _stop(self, rest: str) -> None:
        if self.calls:
            self._finish(rest)
        else:
            self.state = BAD

    def _finish(self, rest: str) -> None:
        self._item = None
        self.state, self.rest = DONE, rest

    def _is_blank(self, text: str) -> bool:
        bare = text.strip()
        return not bare or self._section.closes.startswith(bare) or not bare.strip(self._section.signs)
