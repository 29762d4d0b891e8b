"""How a model's thinking is shown: apart from the answer, dim on a terminal, never in a piped stdout."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from krasis.formats.process.standard_streams import write_output
from krasis.runtime.generation import Generation, Piece
from krasis.runtime.text.thinking import REASONING

HEADING, END = "[thinking]", "[answer]"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class ThinkingView:
    """Writes the pieces of one answer. show: also the thinking; None: where stdout is a terminal.

    On a terminal the thinking comes before the answer, dim if the terminal can (not with TERM=dumb or
    NO_COLOR), between two headings. Elsewhere stdout has the answer only, and the thinking goes to stderr.
    """

    __slots__ = ("_colours", "_show", "_stream", "_thinking")

    def __init__(self, show: bool | None = None) -> None:
        is_terminal = sys.stdout.isatty()
        self._show = is_terminal if show is None else show
        self._stream: TextIO = sys.stdout if is_terminal else sys.stderr
        self._colours = self._stream.isatty() and can_colour()
        self._thinking = False

    def write(self, piece: Piece) -> None:
        """Part of the answer or of the thinking, at once."""
        from krasis.runtime.cli.output import write_text

        if piece.kind == REASONING:
            if self._show and piece.text:
                self._write_thinking(piece.text)
        else:
            if piece.text:
                self.close(END)
            write_text(piece.text)

    def close(self, heading: str = "") -> None:
        """Ends the thinking, if there was some; heading: what stands before the answer."""
        if self._thinking:
            self._thinking = False
            end = _PLAIN if self._colours else ""
            self._put(f"{end}\n{heading}\n" if heading else f"{end}\n")

    def _write_thinking(self, text: str) -> None:
        from krasis.runtime.cli.output import safe_for_terminal

        if not self._thinking:
            self._thinking = True
            self._put(f"{HEADING}\n" + (_DIM if self._colours else ""))
        self._put(safe_for_terminal(text) if self._stream.isatty() else text)

    def _put(self, text: str) -> None:
        if self._stream is sys.stdout:
            write_output(text)  # whose failure ends the answer
            return
        self._stream.write(text)
        self._stream.flush()


def can_colour() -> bool:
    """Whether a terminal is to be sent more than text."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def write_whole(stats: Generation, show: bool | None = None) -> None:
    """A complete answer on stdout, its thinking where ``ThinkingView`` puts it."""
    from krasis.runtime.cli.output import write_text

    view = ThinkingView(show)
    view.write(Piece(None, stats.reasoning, REASONING))
    view.write(Piece(None, stats.text))
    view.close()
    write_text("\n")


def unfinished_note(stats: Generation) -> str:
    """Why there is no answer where a model did nothing but think; empty if there is one."""
    if stats.text or not stats.reasoning or stats.stop_reason == "interrupted":
        return ""
    remedy = {
        "length": "a larger --max-tokens lets it come to an answer",
        "context": "a larger --ctx lets it come to an answer",
    }.get(stats.stop_reason)
    if remedy is None:
        return f"the model ended after {len(stats.tokens)} tokens of thinking, without an answer"
    return f"the model was still thinking after {len(stats.tokens)} tokens; {remedy}"
