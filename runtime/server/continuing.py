"""Answers that go on with the conversation's last message, which the client has begun for the assistant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from krasis.formats.errors import UsageError
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields

Row = dict[str, Any]

# Stands at the end of the message while it is rendered: templates cut blanks off at a text's end, and write
# marks behind it. A template changes no letters.
_MARK = "\ue0f1krasis-goes-on\ue0f2"


def read_goes_on(fields: Fields, messages: object) -> bool:
    """vLLM's and llama.cpp's ``continue_final_message``; where neither it nor its opposite is said, whether
    the last message is the beginning of an answer. Raises ApiError if a new message is wanted too, or if two
    answers stand at the end and nothing says what is wanted."""
    if not fields.has("continue_final_message") and not fields.has("add_generation_prompt"):
        if not isinstance(messages, list) or not is_begun(messages):
            return False
        if is_begun(messages[:-1]):
            raise refused(
                "The last two messages are both the assistant's: 'continue_final_message' must say whether "
                "the answer goes on with the last one (true) or is a new one (false).",
                "messages",
            )
        return True
    if not fields.flag("continue_final_message"):
        return False
    if fields.flag("add_generation_prompt"):
        raise refused(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
            "continue_final_message",
        )
    return True


def is_begun(rows: Sequence[Any]) -> bool:
    """Whether the last message is text of the assistant: clients begin an answer so."""
    last = rows[-1] if rows and isinstance(rows[-1], Mapping) else {}
    content = last.get("content")
    return last.get("role") == "assistant" and not last.get("tool_calls") and bool(content)


def check_begun(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError if the last message is not text of the assistant."""
    last = rows[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise UsageError(
            "only a text of the assistant can be gone on with",
            where="the last message",
            got="calls of tools" if last.get("tool_calls") else last["role"],
        )


def text_to_go_on(rows: Sequence[Row], render: Callable[[list[Row]], str]) -> str:
    """The prompt up to the end of the last message's text. render: gives the text of messages.

    Raises UsageError if the template leaves that message out.
    """
    *before, last = rows
    content = last.get("content") or ""
    words = content if isinstance(content, str) else "".join(str(part["text"]) for part in content)
    if _MARK in words:
        raise UsageError("the last message has a mark in it that is not for messages")
    text, mark, _ = render([*before, {**last, "content": words + _MARK}]).rpartition(_MARK)
    if not mark:
        raise UsageError("the chat template leaves the last message out; it cannot be gone on with")
    return text
