"""A chat's prompt by prompt_toolkit: editing of several lines, pastes as one text, history, Tab.

Imported by a chat only: it costs a tenth of a second that one answer shall not pay.
"""

from __future__ import annotations

import os
import termios
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import (
    Processor,
    TabsProcessor,
    Transformation,
    TransformationInput,
)
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from krasis.runtime.cli.chat_history import ChatHistory, history_path
from krasis.runtime.cli.output import hide_bidi
from krasis.runtime.cli.prompt_input import MORE, PROMPT, Typed, is_unfinished
from krasis.runtime.cli.terminal_mode import TerminalMode


class LineEditor:
    """A ``PromptInput``. Enter sends; Alt-Enter, a trailing backslash or open triple quotes begin a line."""

    def __init__(self, source: TextIO, terminal: TextIO, *, remember: bool) -> None:
        output = Vt100_Output.from_pty(
            terminal, term=os.environ.get("TERM"), default_color_depth=ColorDepth.DEPTH_1_BIT
        )
        # Asking where the cursor is delays terminals that do not answer, and the answers mix with keys.
        output.enable_cpr = False
        self._mode = TerminalMode(source.fileno(), terminal)
        self._literal = False
        self._session: PromptSession[str] = PromptSession(
            _drawn(PROMPT),
            multiline=Condition(lambda: not self._literal and is_unfinished(get_app().current_buffer.text)),
            prompt_continuation=lambda _, __, num_wraps: "" if num_wraps else _drawn(MORE),
            history=ChatHistory(history_path() if remember else None),
            completer=CommandCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            enable_suspend=True,
            input_processors=[_HideBidi(), TabsProcessor(char1=" ", char2=" ")],
            key_bindings=self._bindings(),
            input=create_input(source),
            output=output,
        )
        self._session.default_buffer.on_text_changed += self._forget_paste

    def session(self) -> AbstractContextManager[None]:
        """As the protocol says: what is typed during an answer is read by the next prompt."""
        return self._mode.quiet()

    def question(self) -> Typed:
        """As the protocol says."""
        self._literal = False
        text = self._read("")
        return Typed(text.strip("\n"), self._literal)

    def edit(self, text: str) -> str:
        """As the protocol says."""
        self._literal = True  # Enter sends, whatever it begins or ends with
        return self._read(text)

    def _read(self, text: str) -> str:
        try:
            # A signal from outside interrupts as it does everywhere else: by KeyboardInterrupt.
            return self._session.prompt(default=text, handle_sigint=False)
        except termios.error as error:
            raise EOFError from error  # the terminal has hung up
        finally:
            self._mode.hush()  # resumed from another program, the editor may have found and left another mode

    def _forget_paste(self, buffer: Buffer) -> None:
        if not buffer.text:
            self._literal = False

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @Condition
        def goes_on() -> bool:
            document = get_app().current_buffer.document
            unquoted = not self._literal and not document.text.lstrip().startswith('"""')
            return unquoted and document.is_cursor_at_the_end and document.text.endswith("\\")

        @keys.add("enter", filter=goes_on)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.delete_before_cursor()
            event.current_buffer.insert_text("\n")

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste)
        def _(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            if text.find("\n") == len(text) - 1:
                text = text.removesuffix("\n")  # a line with its end is no text of two lines
            if not event.current_buffer.text:
                self._literal = "\n" in text.strip("\n")
            event.current_buffer.insert_text(text)

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.app.exit(result="", style="class:aborting")
            else:
                event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

        return keys


class CommandCompleter(Completer):
    """Tab: /commands, the file of /save and /load, the names of /set."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may stand at the cursor."""
        from krasis.runtime.cli.terminal import COMMANDS, setting_names

        name, blank, rest = document.text_before_cursor.partition(" ")
        if not name.startswith("/") or "\n" in document.text:
            return
        if not blank:
            yield from _beginning(name[1:], COMMANDS)
        elif COMMANDS.get(name[1:]) is not None and COMMANDS[name[1:]].argument == "FILE":
            try:
                yield from self._paths.get_completions(Document(rest.lstrip()), complete_event)
            except (OSError, ValueError):  # a name no file can have
                return
        elif name == "/set" and " " not in rest:
            yield from _beginning(rest, (one for one in setting_names() if " " not in one))


def _beginning(text: str, words: Iterable[str]) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(text)) for word in words if word.startswith(text))


def _drawn(prompt: str) -> FormattedText:
    """prompt with the blank at its end: without a style that is a move of the cursor, which who watches the
    terminal (a screen reader, a script) does not see as a prompt.
    """
    return FormattedText([("fg:ansidefault", prompt)])


class _HideBidi(Processor):
    """What turns the order of text around is shown as a mark: the line of a stranger's saved chat, too."""

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        fragments = [(fragment[0], hide_bidi(fragment[1])) for fragment in transformation_input.fragments]
        return Transformation(list(fragments))
