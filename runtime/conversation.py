"""A chat: messages, what may be done with them, and the file form of /save and /load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.chat import Message
from krasis.runtime.engine import Engine, Progress
from krasis.runtime.generation import Answer
from krasis.runtime.settings import SamplingSettings

MAX_FILE_BYTES = 64 * 2**20


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

    def _answer(self, progress: Progress | None, stop: Sequence[str]) -> Answer:
        return self.engine.generate(
            self.messages, self.sampling, max_tokens=self.max_tokens, stop=stop, progress=progress
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

    def save(self, path: Path) -> None:
        """Writes JSON. Raises UsageError if the file exists or cannot be written."""
        record = {
            "messages": [{"role": message.role, "content": message.content} for message in self.messages]
        }
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UsageError(
                "the conversation cannot be saved", where=str(path), got=error.strerror
            ) from error

    def load(self, path: Path) -> None:
        """Reads what ``save`` wrote. Raises UsageError or FormatError, and then nothing has changed."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                "the conversation cannot be read", where=str(path), got=error.strerror
            ) from error
        record = parse_json_object(data, str(path), max_bytes=MAX_FILE_BYTES)
        rows = record.get("messages")
        if set(record) != {"messages"} or not isinstance(rows, list):
            raise FormatError("this is no saved conversation", where=str(path), got=", ".join(record))
        messages = [_message(row, str(path)) for row in rows]
        if any(message.role == "system" for message in messages[1:]):
            raise FormatError("a system message must come first", where=str(path))
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
