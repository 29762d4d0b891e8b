"""What a request asks the engine for, read from chat's fields; everything that can be refused is refused
here, before the first byte of an answer."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from krasis.runtime.server.continuing import read_goes_on
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.grammar import Grammar, read_response_format
from krasis.runtime.server.sampling import (
    MAX_TOP_LOGPROBS,
    read_bias,
    read_max_tokens,
    read_sampling,
    read_stops,
)
from krasis.runtime.server.service import Service
from krasis.runtime.server.sessions import is_task
from krasis.runtime.server.thought_form import APART, read_form
from krasis.runtime.server.tools.calls import CallFormat
from krasis.runtime.server.tools.choice import ToolChoice, read_tools
from krasis.runtime.server.tools.forced import call_grammar
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.text.thinking import Format, opened_by

_NEVER = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """prompt: ids, fewer than the context holds. model: as the client calls it. call_format: how calls are
    written, None: none are looked for. num_logprobs: alternatives of each token; None: no log probabilities
    at all. grammar: what the answer must be; it begins after the thinking. thinking: what the prompt has
    opened. is_plain: a text to go on with, no turn of a chat. is_task: it asks about a conversation. session:
    the client's name for the conversation. thought_form: see ``ThoughtForm``. num_answers: to this
    prompt. use_cache, slot, sampled_logprobs: see
    ``serving.api.Request``. wants_tokens: whether ``Picked`` steps are wanted.
    """

    prompt: list[int]
    model: str
    sampling: SamplingSettings
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    choice: ToolChoice = ToolChoice()  # noqa: RUF009  frozen, so one may be shared
    call_format: CallFormat | None = None
    grammar: Grammar | None = None
    thinking: Format | None = None
    is_plain: bool = False
    ignore_ends: bool = False
    is_task: bool = False
    session: str = ""
    thought_form: str = APART
    num_answers: int = 1
    use_cache: bool = True
    wants_tokens: bool = False
    sampled_logprobs: bool = False
    slot: int | None = None

    @property
    def closes(self) -> tuple[str, ...]:
        """The markers that end the thinking the prompt has opened; none if it has opened none."""
        return () if self.thinking is None else self.thinking.closes

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with thinking."""
        return self.thinking is not None

    def number(self, prefix: str) -> str:
        """A new id."""
        return prefix + secrets.token_hex(16)


def read_chat_ask(service: Service, fields: Fields) -> Ask:
    """Chat's request. Raises ApiError."""
    variables = dict(fields.mapping("chat_template_kwargs") or {})
    return make_ask(
        service,
        fields,
        messages=fields.any("messages"),
        choice=_choice(fields),
        think=read_effort(fields),
        variables=variables,
        goes_on=read_goes_on(fields, fields.any("messages")),
        sampling=read_sampling(fields, service.sampling),
        max_tokens=read_max_tokens(fields),
        stops=read_stops(fields),
        num_logprobs=_num_logprobs(fields),
        grammar=read_response_format(fields),
        thought_form=read_form(fields, service.settings.thought_form),
    )


def make_ask(
    service: Service,
    fields: Fields,
    *,
    messages: object,
    choice: ToolChoice,
    think: bool | None,
    variables: Mapping[str, object] | None,
    sampling: SamplingSettings,
    max_tokens: int | None,
    stops: tuple[str, ...],
    num_logprobs: int | None = None,
    grammar: Grammar | None = None,
    goes_on: bool = False,
    thought_form: str = APART,
) -> Ask:
    """A conversation's request, of whichever API. goes_on: see ``Prompts.text``. Raises ApiError."""
    model = service.model_name(fields.any("model"))
    bias = read_bias(fields, service.core.vocab_size)
    session = fields.any("prompt_cache_key")
    prompts = service.prompts
    if choice.must_call:
        grammar = call_grammar(
            prompts.call_format, choice.callable_tools, prompts.assets.tokenizer.special_tokens()
        )
    grammar = service.grammars.check(grammar)
    text = prompts.text(messages, choice.tools, think=think, variables=variables, goes_on=goes_on)
    ids = prompts.tokens(text)
    opened = opened_by(ids, prompts.assets.thinking, prompts.assets.tokenizer)
    if choice.tools and not choice.may_call:
        bias = {**service.call_openers(), **bias}
    return Ask(
        prompt=prompts.checked(ids),
        model=model,
        sampling=sampling,
        max_tokens=max_tokens,
        stops=stops,
        bias=bias,
        num_logprobs=num_logprobs,
        choice=choice,
        call_format=prompts.call_format if choice.may_call else None,
        grammar=grammar,
        thinking=opened,
        ignore_ends=fields.flag("ignore_eos"),
        session=session if isinstance(session, str) else "",
        is_task=is_task(messages),
        thought_form=thought_form,
        slot=read_slot(fields),
    )


def read_effort(fields: Fields) -> bool | None:
    """Whether to think, by OpenAI's ``reasoning_effort`` or ``reasoning.effort``; None: as the model does."""
    effort = fields.any("reasoning_effort")
    reasoning = fields.object("reasoning")
    if effort is None and reasoning is not None:
        effort = reasoning.any("effort")
    if effort is None:
        return None
    if not isinstance(effort, str):
        raise fields.wrong("reasoning_effort", "a string")
    return effort not in ("none", "off")


def read_slot(fields: Fields) -> int | None:
    """llama.cpp's ``id_slot``: the slot that the answer must have; None: whichever serves it best."""
    number = fields.integer("id_slot", -1, 2**31 - 1)
    return None if number == -1 else number


def _choice(fields: Fields) -> ToolChoice:
    if fields.has("functions") or fields.has("function_call"):
        raise refused("'functions' is no longer supported; use 'tools'.", "functions")
    return read_tools(fields)


def _num_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not fields.flag("logprobs"):
        if top:
            raise refused("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        return None
    return top or 0


__all__ = ["Any", "Ask", "make_ask", "read_chat_ask", "read_effort"]
