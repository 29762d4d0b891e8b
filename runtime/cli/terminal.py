"""krasis-run's interactive chat: /commands, streaming, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.process import stop_signals
from krasis.formats.process.standard_streams import OutputError
from krasis.runtime.cli.chat_commands import AS_TEXT, Question, parse
from krasis.runtime.cli.conversation import PREFIX_SUFFIX, Conversation
from krasis.runtime.cli.output import PrefillBar, note, stream_answer
from krasis.runtime.cli.prompt_input import QUOTES, Typed, open_input
from krasis.runtime.cli.report import banner, memory_note, speed_line, summary_line
from krasis.runtime.cli.text_settings import TEXT_OPTIONS, set_text_option, text_settings
from krasis.runtime.cli.thinking_view import unfinished_note
from krasis.runtime.engine import Progress
from krasis.runtime.generation import Answer, Generation
from krasis.runtime.settings import SamplingSettings

logger = logging.getLogger(__name__)


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
    a terminal. stats: tell the speed of every answer. remember: keep the questions for later chats.
    """

    def __init__(
        self,
        conversation: Conversation,
        stop: tuple[str, ...] = (),
        show_thinking: bool | None = None,
        *,
        stats: bool = False,
        remember: bool = True,
    ) -> None:
        self.conversation = conversation
        self._stop = stop
        self.show_thinking = show_thinking
        self._stats = stats
        self._last: Generation | None = None
        self._interrupted = False  # by the last key, at the prompt
        self._input = open_input(remember=remember)

    def run(self) -> None:
        """The session. Raises OutputError when the answers can no longer be written."""
        note(banner(self.conversation.engine))
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        with self._input.session():
            self._converse()

    def _converse(self) -> None:
        going_on = True
        while going_on and stop_signals.received() is None:
            try:
                going_on = self._turn()
            except KeyboardInterrupt:  # in a command, or anywhere but in an answer, which handles its own
                note("\n(stopped)")

    def _turn(self) -> bool:
        """One question or command; whether the user stays."""
        try:
            typed = self._input.question()
        except (EOFError, OSError):  # Ctrl-D, or the terminal has closed
            return False
        except KeyboardInterrupt:
            if self._interrupted or stop_signals.received() is not None:
                return False
            self._interrupted = True
            note("(Ctrl-C again, Ctrl-D or /quit leaves)")
            return True
        self._interrupted = False
        if stop_signals.received() is not None:  # while it was typed, and the reader did not tell
            return False
        try:
            self._handle(typed)
        except QuitError:
            return False
        except OutputError:
            raise
        except KrasisError as error:
            note(f"{error}")
        except Exception as error:  # hours of conversation do not end by a fault of ours
            logger.debug("a fault in the chat", exc_info=True)
            note(f"that failed, by a fault of Krasis ({type(error).__name__}: {error}); the chat goes on")
        return True

    def _handle(self, typed: Typed) -> None:
        if not typed.text.strip():
            return
        line = parse(typed, COMMANDS)
        if isinstance(line, Question):
            if line.text.strip():
                self._answer(partial(self.conversation.ask, line.text))
            return
        command, argument = COMMANDS[line.name], line.argument
        missing = bool(argument) != bool(command.argument) and not command.argument.startswith("[")
        if missing or ("\n" in argument and "TEXT" not in command.argument):
            usage = f"/{line.name} {command.argument}".rstrip()
            raise UsageError("wrong use", where=f"/{line.name}", hint=f"{usage} ({AS_TEXT})")
        command.run(self, argument)

    def _answer(self, ask: Callable[[Progress, tuple[str, ...]], Answer]) -> None:
        """Writes the answer that ask begins; a Ctrl-C keeps what was written so far. Without an answer the
        conversation is what it was before.
        """
        before = list(self.conversation.turns)
        try:
            with PrefillBar(self.conversation.engine) as bar:
                stats = stream_answer(ask(bar.update, self._stop), bar, show_thinking=self.show_thinking)
        except BaseException:
            self.conversation.turns = before
            raise
        self._last = stats
        if stats.stop_reason == "interrupted" and not stats.text:
            self.conversation.turns = before
            note("(stopped before an answer began: the conversation is as it was before)")
            return
        self.conversation.add_answer(stats.text)
        if self._stats:
            note(speed_line(stats, self.conversation.engine))
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
        try:
            text = text or self._input.edit(question)
        except EOFError:
            return
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
        self.conversation.save(path_of(name))
        held = len(self.conversation.engine.tokens)
        note(f"saved {name}" + (f" with {held} computed tokens" if name.endswith(PREFIX_SUFFIX) else ""))

    def load(self, name: str) -> None:
        """/load."""
        if self.conversation.load(path_of(name)):
            note(f"loaded {len(self.conversation.turns)} messages")
        else:
            note("loaded the computed tokens; no conversation was saved with them")

    def show_stats(self, _: str) -> None:
        """/stats."""
        engine = self.conversation.engine
        if self._last is not None:
            note(summary_line(self._last, engine))
        if advice := memory_note(engine):
            logger.info(advice)
        note(f"context {len(engine.tokens)} of {engine.context} tokens; {engine.description}")

    def set_value(self, text: str) -> None:
        """/set NAME VALUE; alone it shows the settings."""
        name, _, value = text.partition(" ")
        if name == "stats":
            self._stats = _on_or_off(name, value.strip())
        elif text and not set_text_option(self, name.replace("-", "_"), value.strip()):
            set_option(self.conversation, name.replace("-", "_"), value.strip())
        values = asdict(self.conversation.sampling) | {"max_tokens": self.conversation.max_tokens}
        shown = [f"{name} {'none' if value is None else value}" for name, value in values.items()]
        shown.append(f"stats {'on' if self._stats else 'off'}")
        note(", ".join([*shown, *text_settings(self)]))

    def show_help(self, _: str) -> None:
        """/help."""
        for name, command in COMMANDS.items():
            note(f"  /{name + ' ' + command.argument:<22}{command.help}")
        note("  Pasted lines are one question. Alt-Enter, or \\ at the end, goes on in the next line;")
        note(f"  {QUOTES} begins and ends a text of several lines. Tab completes commands and files.")
        note("  A blank before a slash makes a question of what would be a command.")

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


def path_of(name: str) -> Path:
    """The file a user named, ~ for the home. Raises UsageError for a name no file can have."""
    if "\0" in name:
        raise UsageError("a file's name cannot have a zero byte", got=name)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(
            "there is no such user", where=name, hint=f"write ./{name} for a file of that name"
        ) from error


def setting_names() -> list[str]:
    """What /set knows."""
    return [*(field.name for field in fields(SamplingSettings)), "max_tokens", "stats", *TEXT_OPTIONS]


def _on_or_off(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{name} is on or off", got=text)
    return text == "on"


def set_option(conversation: Conversation, name: str, text: str) -> None:
    """Changes a sampling setting or max_tokens. Raises UsageError for an unknown name or a bad value;
    ``none`` unsets."""
    known = [field.name for field in fields(SamplingSettings)]
    if name not in (*known, "max_tokens"):
        raise UsageError("unknown setting", got=name, limit=", ".join(setting_names()))
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
