"""A chat: messages, what may be done with them, and the file forms of /save and /load."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from krasis.formats.errors import FormatError, KrasisError, UsageError
from krasis.formats.files.atomic_file import AtomicFile
from krasis.formats.plain_text import BYTE_ORDER_MARK, plain_text
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.engine import Engine, Progress
from krasis.runtime.generation import Answer
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.state.kv_file import MAX_CONVERSATION_BYTES, looks_like_prefix
from krasis.runtime.text.chat import Message
from krasis.runtime.user_files import read_user_file

MAX_FILE_BYTES = MAX_CONVERSATION_BYTES  # of both forms, so that what is saved can be loaded
PREFIX_SUFFIX = ".kv"  # a conversation saved under such a name takes its keys and values along


class Conversation:
    """Messages in turn, user and assistant; system is kept apart, None for none."""

    def __init__(
        self, engine: Engine, sampling: SamplingSettings, max_tokens: int | None, system: str | None
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.system = system
        self.turns: list[Message] = []
        self.template_vars: dict[str, object] = {}  # what the template is told beside, on top of the settings

    @property
    def system(self) -> str | None:
        """The system message. Setting it raises UsageError for text that is not UTF-8."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = None if text is None else plain_text(text, "the system message")

    @property
    def messages(self) -> list[Message]:
        """All of it, as the template wants it."""
        return ([Message("system", self.system)] if self.system else []) + self.turns

    def ask(self, text: str, progress: Progress | None = None, stop: Sequence[str] = ()) -> Answer:
        """Adds a question and begins its answer. Without room for it, nothing is added and UsageError is
        raised."""
        self.turns.append(Message("user", text))
        try:
            return self._answer(progress, stop)
        except (UsageError, FormatError):
            self.turns.pop()
            raise

    def ask_again(self, progress: Progress | None = None, stop: Sequence[str] = ()) -> Answer:
        """Drops the last answer and begins another. Raises UsageError if there is no question."""
        if not self.turns:
            raise UsageError("there is nothing to answer again")
        if self.turns[-1].role == "assistant":
            self.turns.pop()
        return self._answer(progress, stop)

    def edit(self, text: str, progress: Progress | None = None, stop: Sequence[str] = ()) -> Answer:
        """Puts text in the place of the last question, drops its answer and begins another.

        What comes before the first change is still in the cache and is not computed again. Raises UsageError
        if there is no question, or without room for the new one; then nothing has changed.
        """
        before = list(self.turns)
        if not before:
            raise UsageError("there is no question to edit")
        self.undo()
        try:
            return self.ask(text, progress, stop)
        except (UsageError, FormatError):
            self.turns = before
            raise

    @property
    def last_question(self) -> str:
        """The text of the last question; empty if there is none."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "user"), "")

    def _answer(self, progress: Progress | None, stop: Sequence[str]) -> Answer:
        return self.engine.generate(
            self.messages,
            self.sampling,
            max_tokens=self.max_tokens,
            stop=stop,
            progress=progress,
            template_vars=self.template_vars,
        )

    def add_answer(self, text: str) -> None:
        """Keeps an answer, whole or interrupted."""
        self.turns.append(Message("assistant", text))

    def undo(self) -> None:
        """Drops the last question and its answer. Raises UsageError if there is none."""
        if not self.turns:
            raise UsageError("there is nothing to undo")
        while self.turns and self.turns.pop().role != "user":
            pass

    def reset(self) -> None:
        """Drops all but the system message."""
        self.turns.clear()

    def to_json(self) -> bytes:
        """All messages, as ``read_json`` takes them. Raises UsageError if they are too long for it."""
        rows = [{"role": message.role, "content": message.content} for message in self.messages]
        text = json.dumps({"messages": rows}, ensure_ascii=False, indent=1) + "\n"
        data = text.encode("utf-8")
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(
                "the conversation is too long to be saved",
                got=f"{len(data)} bytes",
                limit=f"{MAX_FILE_BYTES} bytes",
                hint="/undo or /reset makes it shorter",
            )
        return data

    def save(self, path: Path) -> None:
        """Writes JSON; under a name that ends in .kv a saved prefix with the JSON in it
        (``Engine.save_prefix``).

        Raises UsageError if the file exists (and is not an older prefix) or cannot be written.
        """
        data = self.to_json()
        if path.suffix == PREFIX_SUFFIX:
            self.engine.save_prefix(path, conversation=data)
            return
        if os.path.lexists(path):
            raise UsageError("the conversation cannot be saved", where=str(path), got="File exists")
        try:
            with AtomicFile(path) as file:
                file.write(data, 0)
                file.commit()
        except KrasisError as error:
            raise UsageError("the conversation cannot be saved", where=str(path), got=error.what) from error

    def load(self, path: Path) -> bool:
        """Reads what ``save`` wrote, in either form; False if a prefix was saved without a conversation.

        Raises UsageError or FormatError, and then no message has changed.
        """
        if looks_like_prefix(path):
            data = self.engine.load_prefix(path)
            if not data:
                return False
        else:
            data = read_user_file(path, "the conversation", MAX_FILE_BYTES)
        self.read_json(data, str(path))
        return True

    def read_json(self, data: bytes, where: str) -> None:
        """Takes the messages of ``to_json``. Raises FormatError, and then nothing has changed."""
        data = data.removeprefix(BYTE_ORDER_MARK.encode())
        record = parse_json_object(data, where, max_bytes=MAX_FILE_BYTES, wide_text=True)
        rows = record.get("messages")
        if set(record) != {"messages"} or not isinstance(rows, list):
            raise FormatError("this is no saved conversation", where=where, got=", ".join(record))
        messages = [_message(row, where) for row in rows]
        if any(message.role == "system" for message in messages[1:]):
            raise FormatError("a system message must come first", where=where)
        self.system = messages.pop(0).content if messages and messages[0].role == "system" else None
        self.turns = messages


def _message(row: object, where: str) -> Message:
    if not isinstance(row, dict) or set(row) != {"role", "content"}:
        raise FormatError("a message must have role and content", where=where, got=row)
    if not isinstance(row["content"], str):
        raise FormatError("content must be text", where=where, got=row["content"])
    try:
        return Message(str(row["role"]), row["content"])
    except UsageError as error:
        raise FormatError(error.what, where=where, got=error.got, limit=error.limit) from error
