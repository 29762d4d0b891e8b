"""krasis-run's interactive chat: line editing, /commands, streaming, Ctrl-C that stops the answer and not the
program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from krasis.formats import stop_signals
from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime.conversation import PREFIX_SUFFIX, Conversation
from krasis.runtime.engine import Progress
from krasis.runtime.generation import Answer, Generation
from krasis.runtime.output import PrefillBar, note, stream_answer
from krasis.runtime.report import memory_note, summary_line
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.text_settings import TEXT_OPTIONS, set_text_option, text_settings
from krasis.runtime.thinking_view import unfinished_note

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'


class QuitError(Exception):
    """The user wants to leave. Never reaches the user."""


@dataclass(frozen=True, slots=True)
class Command:
    """A /command. argument: its name in /help, empty if it takes none."""

    argument: str
    help: str
    run: Callable[[Terminal, str], None]


class Terminal:
    """Reads questions until the user leaves. stop: strings that end an answer. show_thinking: None = yes, on
    a terminal."""

    def __init__(
        self, conversation: Conversation, stop: tuple[str, ...] = (), show_thinking: bool | None = None
    ) -> None:
        self.conversation = conversation
        self._stop = stop
        self.show_thinking = show_thinking
        self._last: Generation | None = None

    def run(self) -> None:
        """The session."""
        _enable_line_editing()
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        interrupted = False
        while stop_signals.received() is None:
            try:
                text = read_question()
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                if interrupted:
                    note("")
                    return
                if stop_signals.received() is not None:
                    return
                interrupted = True
                note("\n(Ctrl-C again, Ctrl-D or /quit leaves)")
                continue
            interrupted = False
            try:
                self._handle(text)
            except QuitError:
                return
            except KrasisError as error:
                note(f"{error}")

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answer(partial(self.conversation.ask, text))
            return
        name, _, argument = text[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError("unknown command", got=f"/{name}", hint="/help lists them")
        argument = argument.strip()
        if bool(argument) != bool(command.argument) and not command.argument.startswith("["):
            raise UsageError("wrong use", where=f"/{name}", hint=f"/{name} {command.argument}".rstrip())
        command.run(self, argument)

    def _answer(self, ask: Callable[[Progress, tuple[str, ...]], Answer]) -> None:
        """Writes the answer that ask begins; a Ctrl-C keeps what was written so far."""
        with PrefillBar(self.conversation.engine) as bar:
            stats = stream_answer(ask(bar.update, self._stop), bar, show_thinking=self.show_thinking)
        self.conversation.add_answer(stats.text)
        self._last = stats
        if advice := unfinished_note(stats):
            note(advice)
        if stats.stop_reason == "context":
            note("the context is full: /reset or /undo makes room, --ctx makes it larger")

    def regenerate(self, _: str) -> None:
        """/regen."""
        self._answer(self.conversation.ask_again)

    def edit(self, text: str) -> None:
        """/edit TEXT; alone it puts the last question on the line to be edited."""
        question = self.conversation.last_question
        if not question:
            raise UsageError("there is no question to edit")
        text = text or edit_line(question)
        if text.strip():
            self._answer(partial(self.conversation.edit, text))

    def undo(self, _: str) -> None:
        """/undo."""
        self.conversation.undo()
        note("forgot the last question and its answer")

    def reset(self, _: str) -> None:
        """/reset."""
        self.conversation.reset()
        note("forgot the conversation")

    def set_system(self, text: str) -> None:
        """/system."""
        self.conversation.system = text or None
        note("system message set" if text else "system message removed")

    def save(self, name: str) -> None:
        """/save."""
        self.conversation.save(Path(name).expanduser())
        held = len(self.conversation.engine.tokens)
        note(f"saved {name}" + (f" with {held} computed tokens" if name.endswith(PREFIX_SUFFIX) else ""))

    def load(self, name: str) -> None:
        """/load."""
        if self.conversation.load(Path(name).expanduser()):
            note(f"loaded {len(self.conversation.turns)} messages")
        else:
            note("loaded the computed tokens; no conversation was saved with them")

    def show_stats(self, _: str) -> None:
        """/stats."""
        engine = self.conversation.engine
        if self._last is not None:
            note(summary_line(self._last, engine))
        if advice := memory_note(engine):
            note(advice)
        note(f"context {len(engine.tokens)} of {engine.context} tokens; {engine.description}")

    def set_value(self, text: str) -> None:
        """/set NAME VALUE; alone it shows the settings."""
        name, _, value = text.partition(" ")
        if text and not set_text_option(self, name.replace("-", "_"), value.strip()):
            set_option(self.conversation, name.replace("-", "_"), value.strip())
        sampling = self.conversation.sampling
        shown = [f"{field.name} {getattr(sampling, field.name)}" for field in fields(sampling)]
        note(", ".join([*shown, f"max_tokens {self.conversation.max_tokens}", *text_settings(self)]))

    def show_help(self, _: str) -> None:
        """/help."""
        for name, command in COMMANDS.items():
            note(f"  /{name + ' ' + command.argument:<22}{command.help}")
        note(f"  A line ending in \\ goes on in the next; {QUOTES} begins and ends a text of several lines.")

    def quit(self, _: str) -> None:
        """/quit."""
        raise QuitError


COMMANDS = {
    "help": Command("", "this list", Terminal.show_help),
    "reset": Command("", "forget the conversation", Terminal.reset),
    "system": Command("[TEXT]", "set the system message; without TEXT remove it", Terminal.set_system),
    "regen": Command("", "answer the last question again", Terminal.regenerate),
    "edit": Command("[TEXT]", "ask TEXT instead of the last question; alone: edit it", Terminal.edit),
    "undo": Command("", "forget the last question and its answer", Terminal.undo),
    "save": Command("FILE", "write the conversation; FILE.kv: with what was computed for it", Terminal.save),
    "load": Command("FILE", "read a conversation, and what was computed for it", Terminal.load),
    "stats": Command("", "speed of the last answer, context used", Terminal.show_stats),
    "set": Command(
        "[NAME VALUE]", "change a setting, such as temperature 0.7 or think off", Terminal.set_value
    ),
    "quit": Command("", "leave", Terminal.quit),
}


def set_option(conversation: Conversation, name: str, text: str) -> None:
    """Changes a sampling setting or max_tokens. Raises UsageError for an unknown name or a bad value;
    ``none`` unsets."""
    known = [field.name for field in fields(SamplingSettings)]
    if name not in (*known, "max_tokens"):
        raise UsageError("unknown setting", got=name, limit=", ".join([*known, "max_tokens", *TEXT_OPTIONS]))
    whole = name in ("top_k", "seed", "max_tokens", "penalty_last_n")
    try:
        value: Any = None if text == "none" else int(text) if whole else float(text)
    except ValueError as error:
        raise UsageError(f"{name} must be a number", got=text) from error
    if value is None and name not in ("seed", "max_tokens"):
        raise UsageError(f"{name} must be a number", got=text)
    if name != "max_tokens":
        conversation.sampling = replace(conversation.sampling, **{name: value})
    elif value is not None and value < 1:
        raise UsageError("max_tokens must be positive", got=text)
    else:
        conversation.max_tokens = value


def read_question() -> str:
    """One question: a line, lines joined by trailing backslashes, or lines between triple quotes.

    Raises EOFError and KeyboardInterrupt as ``input`` does.
    """
    line = input(PROMPT)
    if line.lstrip().startswith(QUOTES):
        return _quoted(line.lstrip().removeprefix(QUOTES))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input(MORE)
    return "\n".join([*lines, line])


def edit_line(text: str) -> str:
    """The user's edit of a text of one line. Raises UsageError where a line cannot be edited in place."""
    if "\n" in text or not sys.stdin.isatty():
        raise UsageError("this question cannot be edited on one line", hint="give the new one: /edit TEXT")
    try:
        import readline
    except ImportError as error:
        raise UsageError(
            "this Python has no line editing", hint="give the new question: /edit TEXT"
        ) from error
    readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        return input(PROMPT)
    finally:
        readline.set_startup_hook(None)


def _quoted(line: str) -> str:
    lines = []
    while QUOTES not in line:
        lines.append(line)
        line = input(MORE)
    return "\n".join([*lines, line.partition(QUOTES)[0]]).strip("\n")


def _enable_line_editing() -> None:
    if sys.stdin.isatty():
        try:
            import readline
        except ImportError:  # a Python built without it: input() still works, plainly
            return
        readline.set_auto_history(True)
