"""Conversations to prompts, by the model's own chat template (Jinja, a stranger's program: see
template_sandbox, sandbox)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.plain_text import plain_text
from krasis.runtime.text.sandbox import Resident, shared_sandbox

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024
# A template adds some words to what it is given; one that makes megabytes of a greeting is no template.
FREE_CHARACTERS = 64 * 1024
CHARACTERS_PER_GIVEN = 16
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. Raises UsageError for an unknown role or a content that is no text."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError("unknown role of a message", got=self.role, limit=", ".join(ROLES))
        plain_text(self.content, f"the {self.role} message")


class ChatTemplate:
    """A compiled template. source: Jinja text. tokens: what templates call bos_token, eos_token and the like.

    It runs in a worker with limits on time and memory (sandbox). Raises FormatError for a template that
    is too large or does not parse, ResourceError if the system starts no worker. probes: what ``messages``
    found out by trying the template.
    """

    __slots__ = ("_resident", "_tokens", "_where", "probes", "source")

    def __init__(self, source: str, tokens: Mapping[str, str], where: str = "chat template") -> None:
        self._where = where
        self.source = source
        self.probes: dict[str, str | None] = {}
        self._tokens = dict(tokens)
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FormatError(
                "the chat template is too large", where=where, got=len(source), limit=MAX_TEMPLATE_CHARACTERS
            )
        data = source.encode("utf-8", "surrogatepass")
        self._resident = Resident("load_template", data, where, "the chat template does not parse")
        shared_sandbox().load(self._resident)

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text. messages: as they are given to the template. tools: JSON schemas of functions.
        variables: what a template offers beside, such as enable_thinking.

        Raises FormatError if the template fails, refuses the messages or exceeds its limits; UsageError for
        variables that JSON cannot hold.
        """
        values = {
            **self._tokens,
            **dict(variables or {}),
            "messages": [
                {"role": one.role, "content": one.content} if isinstance(one, Message) else one
                for one in messages
            ],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._rendered(values)

    def _rendered(self, values: Mapping[str, Any]) -> str:
        try:
            given = json.dumps(values)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                "what is given to the chat template must be JSON values", where=self._where, got=error
            ) from error
        most = min(MAX_PROMPT_CHARACTERS, FREE_CHARACTERS + CHARACTERS_PER_GIVEN * len(given))
        answer = shared_sandbox().call(
            self._resident,
            "render",
            "the chat template refused the conversation",
            {"max_characters": most},
            given.encode("ascii"),
            4 * most,
        )
        try:
            return answer.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("the chat template writes half characters", where=self._where) from error


def missing_template(where: str) -> UsageError:
    """The error for a chat with a bundle that has no template."""
    return UsageError("the bundle has no chat template", where=where, hint="use --raw to continue plain text")
