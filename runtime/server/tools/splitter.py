"""Parts a model's text into words and calls of tools, as it arrives.

What was given out is never looked at again. A call is given out when it is whole: one that the end of the
answer cuts off is none (half a command must not be run), and what merely looks like a call is words again.
"""

from __future__ import annotations

from krasis.runtime.server.tools.calls import (
    BAD,
    DONE,
    OPEN,
    Call,
    CallFormat,
    CallReader,
    Text,
    Tools,
    overlap,
)
from krasis.runtime.text.thinking import ANSWER, REASONING

Part = Text | Call


class CallSplitter:
    """Takes segments of ``ThinkingSplitter`` and gives parts. Without a format everything is words.

    Blanks in front of a call, between calls and behind one belong to the markers. A model that calls while it
    thinks has forgotten to end its thinking, if nothing but calls follows; otherwise it only thought of
    calling.
    """

    __slots__ = (
        *("_called", "_format", "_held", "_kind", "_num_taken", "_reader", "_said", "_thought"),
        *("_thought_text", "_tools", "_written"),
    )

    def __init__(self, call_format: CallFormat | None, tools: Tools = ()) -> None:
        self._format, self._tools = call_format, tools
        self._kind = ANSWER
        self._held = ""  # blanks, and what may be the beginning of a marker
        self._reader: CallReader | None = None
        self._written = ""  # what the reader was given
        self._num_taken = 0  # of its calls
        self._called = False  # whether the last thing was a call
        self._said = False  # whether there were words of the answer
        self._thought: list[Call] = []  # calls inside of thinking
        self._thought_text = ""

    def push(self, kind: str, text: str) -> list[Part]:
        """The parts that became certain. kind: of the text."""
        if self._format is None:
            return [Text(kind, text)] if text else []
        parts: list[Part] = []
        if kind != self._kind:
            self._change(kind, parts)
        self._take(text, parts)
        return parts

    def finish(self, *, truncated: bool) -> list[Part]:
        """What was held back. truncated: the text was cut off; then an unfinished call is dropped."""
        parts: list[Part] = []
        self._end_reader(parts, truncated=truncated)
        parts += self._thought
        self._thought, self._thought_text = [], ""
        self._show(self._held, parts)
        self._held = ""
        return parts

    def _change(self, kind: str, parts: list[Part]) -> None:
        """Thinking ends, or begins anew: what was held belongs to what came before."""
        self._end_reader(parts, truncated=False)
        self._drop_thought(parts)
        self._show(self._held, parts)
        self._held, self._kind, self._called = "", kind, False

    def _end_reader(self, parts: list[Part], *, truncated: bool) -> None:
        """Nothing more follows; what a reader leaves may begin another call."""
        while (reader := self._reader) is not None:
            reader.end(truncated=truncated)
            if reader.state == DONE:
                self._take(self._take_calls(reader, parts), parts)
            elif truncated:
                self._reader = None
            else:
                self._give_up(parts, again=False)

    def _take(self, text: str, parts: list[Part]) -> None:
        while text:
            if self._reader is None:
                text = self._outside(self._held + text, parts)
                continue
            self._written += text
            self._reader.feed(text)
            text = ""
            if self._reader.state == DONE:
                text = self._take_calls(self._reader, parts)
            elif self._reader.state == OPEN and self._kind == ANSWER:
                self._take_whole(self._reader, parts)
            elif self._reader.state == BAD:
                text = self._give_up(parts, again=True)

    def _outside(self, text: str, parts: list[Part]) -> str:
        """Shows words up to a marker; gives what belongs to the call behind it."""
        openers = self._format.openers if self._format is not None else ()
        places = [at for one in openers if (at := text.find(one)) >= 0]
        if (beginning := self._at_start(text)) == 0:
            self._held = text
            return ""
        if beginning is not None:
            places.append(len(text) - beginning)
        if places:
            at = min(places)
            self._show(text[:at].rstrip(), parts)
            self._held = ""
            if self._format is not None:
                self._reader = self._format.reader(self._tools)
            self._written = text[:at][len(text[:at].rstrip()) :]  # blanks, should it be no call
            return text[at:]
        keep = max((overlap(text, one) for one in openers), default=0)
        keep += len(text[: len(text) - keep]) - len(text[: len(text) - keep].rstrip())
        self._held = text[len(text) - keep :]
        self._show(text[: len(text) - keep], parts)
        return ""

    def _at_start(self, text: str) -> int | None:
        """The size of what begins as calls do at the start of an answer alone; 0 if it may yet; None."""
        starts = self._format.at_start if self._format is not None else ()
        if not starts or self._said or self._kind != ANSWER:
            return None
        bare = text.lstrip()
        if bare.startswith(starts):
            return len(bare)
        return 0 if any(one.startswith(bare) for one in starts) else None

    def _take_whole(self, reader: CallReader, parts: list[Part]) -> None:
        """Gives out the calls that became whole."""
        if len(reader.calls) > self._num_taken:
            parts += reader.calls[self._num_taken :]
            self._num_taken, self._called = len(reader.calls), True

    def _take_calls(self, reader: CallReader, parts: list[Part]) -> str:
        """All calls are whole; gives what follows them."""
        rest = reader.rest
        if self._kind == REASONING:
            self._thought += reader.calls
            self._thought_text += self._written[: len(self._written) - len(rest)]
        else:
            self._take_whole(reader, parts)
        self._reader, self._held, self._num_taken = None, "", 0
        self._written, self._called = "", True
        return rest

    def _give_up(self, parts: list[Part], *, again: bool) -> str:
        """It was no call: its opening marker is words. again: the rest is looked through once more."""
        written, self._reader, self._written = self._written, None, ""
        openers = (*self._format.openers, *self._format.at_start) if self._format is not None else ()
        size = len(written) if not again else _behind_opener(written, openers)
        self._show(written[:size], parts)
        return written[size:]

    def _show(self, text: str, parts: list[Part]) -> None:
        if self._called:
            text = text.lstrip()
        if not text:
            return
        self._drop_thought(parts)
        self._called, self._said = False, self._said or self._kind == ANSWER
        parts.append(Text(self._kind, text))

    def _drop_thought(self, parts: list[Part]) -> None:
        """Words follow: the calls were thoughts of calls."""
        if self._thought:
            parts.append(Text(REASONING, self._thought_text))
            self._thought, self._thought_text = [], ""


def split_whole(call_format: CallFormat | None, tools: Tools, text: str) -> list[Part]:
    """The parts of an answer that is there as a whole."""
    splitter = CallSplitter(call_format, tools)
    return [*splitter.push(ANSWER, text), *splitter.finish(truncated=False)]


def _behind_opener(text: str, openers: tuple[str, ...]) -> int:
    blanks = len(text) - len(text.lstrip())
    sizes = [len(one) for one in openers if text.startswith(one, blanks)]
    return blanks + (max(sizes) if sizes else 0) or len(text)


__all__ = ["OPEN", "CallSplitter", "Part", "split_whole"]
