"""Conversations to prompts, by the model's own chat template (Jinja, a stranger's program: see
template_sandbox)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.plain_text import plain_text

if TYPE_CHECKING:
    from jinja2 import Template

    from krasis.runtime.template_sandbox import LimitedEnvironment

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a template can raise beside Jinja's own errors: it computes with Python values.
_FAILURES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, MemoryError)


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

    Raises FormatError for a template that is too large or does not parse. probes: what ``messages`` found out
    by trying the template.
    """

    __slots__ = ("_environment", "_template", "_tokens", "_where", "probes", "source")

    def __init__(self, source: str, tokens: Mapping[str, str], where: str = "chat template") -> None:
        from jinja2 import TemplateError

        from krasis.runtime.template_sandbox import LimitedEnvironment

        self._where = where
        self.source = source
        self.probes: dict[str, str | None] = {}
        self._tokens = dict(tokens)
        self._environment: LimitedEnvironment = LimitedEnvironment()
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FormatError(
                "the chat template is too large", where=where, got=len(source), limit=MAX_TEMPLATE_CHARACTERS
            )
        try:
            self._template: Template = self._environment.compile_limited(source)
        except (TemplateError, SyntaxError, *_FAILURES) as error:
            raise FormatError(
                "the chat template does not parse", where=where, got=_one_line(error)
            ) from error

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

        Raises FormatError if the template fails, refuses the messages or exceeds its limits.
        """
        from jinja2 import TemplateError

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
        pieces: list[str] = []
        size = 0
        try:
            with self._environment.counting():
                for piece in self._template.generate(values):
                    size += len(piece)
                    if size > MAX_PROMPT_CHARACTERS:
                        raise FormatError(
                            "the chat template writes too much",
                            where=self._where,
                            limit=MAX_PROMPT_CHARACTERS,
                        )
                    pieces.append(piece)
        except (TemplateError, *_FAILURES) as error:
            raise FormatError(
                "the chat template refused the conversation", where=self._where, got=_one_line(error)
            ) from error
        text = "".join(pieces)
        if not text.isascii() and not _is_encodable(text):
            raise FormatError("the chat template writes half characters", where=self._where)
        return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def missing_template(where: str) -> UsageError:
    """The error for a chat with a bundle that has no template."""
    return UsageError("the bundle has no chat template", where=where, hint="use --raw to continue plain text")
