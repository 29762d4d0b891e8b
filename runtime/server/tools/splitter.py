"""Parts a model's text into words and calls of tools, as it arrives.

What was given out is never looked at again. A call is given out when it is whole: one that the end of the
answer cuts off is none (half a command must not be run), and what merely looks like a call is words again.
"""

from __future__ import annotations

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, CallFormat, CallReader, Text, Tools
from krasis.runtime.text.thinking import ANSWER, REASONING

Part = Text | Call


class CallSplitter:
    """Takes segments of ``ThinkingSplitter`` and gives parts. Without a format everything is words.

    Blanks in front of a call, between calls and behind one belong to the markers. A model that calls while it
    thinks has forgotten to end its thinking, if nothing but calls follows; otherwise it only thought of
    calling.
    """

    __slots__ = (
        *("_called", "_format", "_held", "_kind", "_reader", "_thought", "_thought_text", "_tools"),
        "_written",
    )

    def __init__(self, call_format: CallFormat | None, tools: Tools = ()) -> None:
        self._format, self._tools = call_format, tools
        self._kind = ANSWER
        self._held = ""  # blanks, and what may be the beginning of a marker
        self._reader: CallReader | None = None
        self._written = ""  # what the reader was given
        self._called = False  # whether the last thing was a call
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
        if self._reader is not None:
            self._reader.end(truncated=truncated)
            if self._reader.state == DONE:
                self._take_call(self._reader, parts)
            elif truncated:
                self._reader = None
            else:
                self._give_up(parts, again=False)
        parts += self._thought
        self._thought, self._thought_text = [], ""
        self._show(self._held, parts)
        self._held = ""
        return parts

    def _change(self, kind: str, parts: list[Part]) -> None:
        """Thinking ends, or begins anew: what was held belongs to what came before."""
        if self._reader is not None:
            self._reader.end(truncated=False)
            if self._reader.state == DONE:
                self._take_call(self._reader, parts)
            else:
                self._give_up(parts, again=False)
        self._drop_thought(parts)
        self._show(self._held, parts)
        self._held, self._kind, self._called = "", kind, False

    def _take(self, text: str, parts: list[Part]) -> None:
        while text:
            if self._reader is None:
                text = self._outside(self._held + text, parts)
                continue
            self._written += text
            self._reader.feed(text)
            text = ""
            if self._reader.state == DONE:
                text = self._take_call(self._reader, parts)
            elif self._reader.state == BAD:
                text = self._give_up(parts, again=True)

    def _outside(self, text: str, parts: list[Part]) -> str:
        """Shows words up to a marker; gives what belongs to the call behind it."""
        openers = self._format.openers if self._format is not None else ()
        places = [at for one in openers if (at := text.find(one)) >= 0]
        if places:
            at = min(places)
            self._show(text[:at].rstrip(), parts)
            self._held = ""
            if self._format is not None:
                self._reader = self._format.reader(self._tools)
            self._written = text[:at][len(text[:at].rstrip()) :]  # blanks, should it be no call
            return text[at:]
        keep = max((_overlap(text, one) for one in openers), default=0)
        keep += len(text[: len(text) - keep]) - len(text[: len(text) - keep].rstrip())
        self._held = text[len(text) - keep :]
        self._show(text[: len(text) - keep], parts)
        return ""

    def _take_call(self, reader: CallReader, parts: list[Part]) -> str:
        """The call is whole; gives what follows it."""
        rest, call = reader.rest, reader.call
        self._reader, self._held = None, ""
        if call is not None and self._kind == REASONING:
            self._thought.append(call)
            self._thought_text += self._written[: len(self._written) - len(rest)]
        elif call is not None:
            parts.append(call)
        self._written, self._called = "", True
        return rest

    def _give_up(self, parts: list[Part], *, again: bool) -> str:
        """It was no call: its opening marker is words. again: the rest is looked through once more."""
        written, self._reader, self._written = self._written, None, ""
        openers = self._format.openers if self._format is not None else ()
        size = len(written) if not again else _behind_opener(written, openers)
        self._show(written[:size], parts)
        return written[size:]

    def _show(self, text: str, parts: list[Part]) -> None:
        if self._called:
            text = text.lstrip()
        if not text:
            return
        self._drop_thought(parts)
        self._called = False
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


def _overlap(text: str, marker: str) -> int:
    """The longest end of text that begins marker."""
    return next(
        (size for size in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-size:])), 0
    )


__all__ = ["OPEN", "CallSplitter", "Part", "split_whole"]
