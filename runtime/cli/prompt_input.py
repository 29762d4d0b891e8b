"""How a chat reads: a line editor on a terminal that can do it, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from krasis.formats.errors import UsageError
from krasis.runtime.cli.output import note

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Typed:
    """What a user entered. literal: pasted lines, which are a question whatever they begin with."""

    text: str
    literal: bool = False


class PromptInput(Protocol):
    """Reads from the user. Both reading calls raise EOFError where there is nothing more (Ctrl-D), and
    KeyboardInterrupt for Ctrl-C on an empty line.
    """

    def session(self) -> AbstractContextManager[None]:
        """What the chat stands in, from its first prompt to its end."""
        ...

    def question(self) -> Typed:
        """One question or command; empty if the user began one and gave it up."""
        ...

    def edit(self, text: str) -> str:
        """The user's edit of text. Raises UsageError where it cannot be edited."""
        ...


def open_input(*, remember: bool) -> PromptInput:
    """The best reader for this terminal. remember: keep the questions for the Up key of later chats."""
    terminal = next((one for one in (sys.stdout, sys.stderr) if one is not None and one.isatty()), None)
    if (
        terminal is None
        or not sys.stdin.isatty()
        or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown")
    ):
        return PlainInput()
    try:
        from krasis.runtime.cli.line_editor import LineEditor
    except ImportError as error:
        note(f"lines are read plainly, as prompt_toolkit cannot be loaded: {error}")
        return PlainInput()
    return LineEditor(sys.stdin, terminal, remember=remember)


def without_quotes(text: str) -> str:
    """text that begins with triple quotes without them and the next ones; what follows these is kept."""
    opened = text.lstrip().removeprefix(QUOTES)
    inner, _, tail = opened.partition(QUOTES)
    return (inner + tail).strip("\n")


def is_unfinished(text: str) -> bool:
    """Whether text begins with triple quotes and has no others yet."""
    opened = text.lstrip()
    return opened.startswith(QUOTES) and QUOTES not in opened.removeprefix(QUOTES)


class PlainInput:
    """Lines as ``input`` gives them: a text of several is joined by trailing backslashes, or stands between
    triple quotes. Pasted lines are questions of their own: such a terminal does not say what was pasted.
    """

    def __init__(self) -> None:
        try:
            import readline
        except ImportError:  # a Python built without it: input() still works, plainly
            return
        readline.set_auto_history(True)

    def session(self) -> AbstractContextManager[None]:
        """As the protocol says: nothing is changed."""
        return nullcontext()

    def question(self) -> Typed:
        """As the protocol says. Ctrl-C and Ctrl-D give up a text that is not finished."""
        text = _line(PROMPT)
        if "\n" in text:  # a readline that knows of pastes
            return Typed(text.strip("\n"), literal=True)
        try:
            while True:
                if is_unfinished(text):
                    text += "\n" + _line(MORE)
                elif text.endswith("\\") and not text.lstrip().startswith(QUOTES):
                    text = text[:-1] + "\n" + _line(MORE)
                else:
                    break
        except (EOFError, KeyboardInterrupt):
            note("(the unfinished text is forgotten)")
            return Typed("")
        return Typed(text)

    def edit(self, text: str) -> str:
        """As the protocol says; texts of one line only."""
        if "\n" in text or not sys.stdin.isatty():
            raise UsageError(
                "this question cannot be edited on one line", hint="give the new one: /edit TEXT"
            )
        try:
            import readline
        except ImportError as error:
            raise UsageError(
                "this Python has no line editing", hint="give the new question: /edit TEXT"
            ) from error
        readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            return _line(PROMPT)
        finally:
            readline.set_startup_hook(None)


def _line(prompt: str) -> str:
    try:
        return _read_line(prompt)
    except (EOFError, KeyboardInterrupt):
        note("")  # the cursor is still behind the prompt
        raise


def _read_line(prompt: str) -> str:
    if sys.stdout is not None and sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for the answers
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
