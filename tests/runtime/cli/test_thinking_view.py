"""Thinking on a terminal, dim or between headings, and never in a piped stdout."""

from __future__ import annotations

import io
import sys

import pytest

from krasis.runtime.cli.thinking_view import ThinkingView, unfinished_note, write_whole
from krasis.runtime.generation import Generation, Piece

PIECES = [Piece(1, "a ", "reasoning"), Piece(2, "b\x1b[2J", "reasoning"), Piece(3, "Yes"), Piece(4, " no")]


class Stream(io.StringIO):
    """Text that was written, to a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> object:
    """(stdout is a terminal, stderr is one, show, TERM, pieces) -> (stdout, stderr)."""

    def write(
        out: bool, err: bool, show: bool | None, term: str = "xterm", pieces: list[Piece] = PIECES
    ) -> tuple[str, str]:
        monkeypatch.setenv("TERM", term)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", Stream(out))
        monkeypatch.setattr(sys, "stderr", Stream(err))
        view = ThinkingView(show)
        for piece in pieces:
            view.write(piece)
        view.close()
        return sys.stdout.getvalue(), sys.stderr.getvalue()  # type: ignore[attr-defined]

    return write


def test_on_a_terminal_it_comes_first_and_dim(written) -> None:
    shown = "[thinking]\n\x1b[2ma b\\x1b[2J\x1b[0m\n[answer]\nYes no"
    assert written(True, True, None) == written(True, True, True) == (shown, "")
    plain = "[thinking]\na b\\x1b[2J\n[answer]\nYes no"
    assert written(True, True, None, "dumb") == (plain, "")
    assert written(True, True, False) == ("Yes no", "")
    # Ended while thinking, and no thinking at all.
    assert written(True, True, None, "dumb", PIECES[:2]) == ("[thinking]\na b\\x1b[2J\n", "")
    assert written(True, True, None, "xterm", PIECES[2:]) == ("Yes no", "")
    assert written(True, True, None, "xterm", [Piece(1, "", "reasoning"), PIECES[2]]) == ("Yes", "")


def test_a_pipe_has_the_answer_only(written) -> None:
    assert written(False, False, None) == ("Yes no", "")
    assert written(False, True, None) == ("Yes no", "")
    assert written(False, True, True, "dumb") == ("Yes no", "[thinking]\na b\\x1b[2J\n[answer]\n")
    out, err = written(False, False, True)
    assert (out, err) == ("Yes no", "[thinking]\na b\x1b[2J\n[answer]\n")


def test_no_color_is_obeyed(written, monkeypatch: pytest.MonkeyPatch) -> None:
    written(True, True, None)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Stream(True))
    write_whole(Generation(text="Yes", reasoning="so"))
    assert sys.stdout.getvalue() == "[thinking]\nso\n[answer]\nYes\n"  # type: ignore[attr-defined]


def test_why_there_is_no_answer() -> None:
    assert unfinished_note(Generation(text="x", reasoning="y", stop_reason="length")) == ""
    assert unfinished_note(Generation(stop_reason="length")) == ""
    assert unfinished_note(Generation(reasoning="y", stop_reason="interrupted")) == ""
    note = unfinished_note(Generation(reasoning="y", stop_reason="length", tokens=[1, 2]))
    assert "2 tokens" in note
    assert "--max-tokens" in note
    assert "without an answer" in unfinished_note(Generation(reasoning="y", stop_reason="end"))
    assert "--ctx" in unfinished_note(Generation(reasoning="y", stop_reason="context"))
