"""POST /v1/completions: text that goes on, with log probabilities of the prompt for those who measure."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.errors import KrasisError
from krasis.runtime.server.ask import Ask, read_slot
from krasis.runtime.server.errors import ApiError, from_krasis, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.grammar import read_response_format
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.sampling import (
    MAX_TOP_LOGPROBS,
    read_bias,
    read_max_tokens,
    read_sampling,
    read_stops,
)
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.several import joined, merged, read_num_answers, repeated
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.turn import End, PromptScored, Scores, Step, TokenScore, Turn
from krasis.runtime.server.usage import FINGERPRINT, openai_usage, timings
from krasis.runtime.server.wire import DONE, data_event, json_response
from krasis.runtime.text.messages import token_ids
from krasis.runtime.text.token_ids import checked_ids

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 128


@dataclass(frozen=True, slots=True)
class Options:
    """How the answer is to be written."""

    stream: bool
    include_usage: bool
    echo: bool
    logprobs: bool
    number: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def shared(self) -> dict[str, Any]:
        """Fields of every object."""
        return {
            "id": self.number,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


async def completions(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    asks = await service.in_thread(_read_asks, service, fields)
    options = _options(fields, asks[0])
    turns = service.begin_all(asks, request)
    if options.stream:
        answer = CompletionStream(options, turns, service)
        no_op = partial(_no_op, options)
        return EventStream(
            with_keepalive(answer.frames(), service.settings.ping_interval_s, no_op), answer.close
        )
    return json_response(await service.whole(request, turns, _whole(options, turns, service)))


def _no_op(options: Options) -> bytes:
    return data_event(_chunk(options, ""))


def _options(fields: Fields, ask: Ask) -> Options:
    stream = fields.flag("stream")
    extra = fields.object("stream_options")
    if extra is not None and not stream:
        raise refused("'stream_options' needs 'stream': true.", "stream_options")
    usage = extra is not None and extra.flag("include_usage")
    echo = fields.flag("echo")
    return Options(stream, usage, echo, ask.num_logprobs is not None, ask.number("cmpl-"), ask.model)


def _read_asks(service: Service, fields: Fields) -> list[Ask]:
    count = read_num_answers(fields)
    if fields.any("suffix"):
        raise refused("'suffix' is not supported.", "suffix")
    prompts = _read_prompts(service, fields.any("prompt"))
    echo = fields.flag("echo")
    max_tokens = read_max_tokens(fields, least=0 if echo else 1)
    logprobs = _num_logprobs(fields)
    grammar = read_response_format(fields)
    grammar = service.grammars.check(grammar)
    shared: dict[str, Any] = {
        "model": service.model_name(fields.any("model")),
        "sampling": read_sampling(fields, service.sampling),
        "max_tokens": DEFAULT_MAX_TOKENS
        if max_tokens is None and not fields.has("n_predict")
        else max_tokens,
        "stops": read_stops(fields),
        "bias": read_bias(fields, service.core.vocab_size),
        "num_logprobs": logprobs,
        "num_prompt_logprobs": logprobs if echo else None,
        "grammar": grammar,
        "is_plain": True,
        "slot": read_slot(fields),
        "ignore_ends": fields.flag("ignore_eos"),
    }
    if len(prompts) * count > MAX_PROMPTS:
        raise refused(f"'n' answers to each prompt are more than {MAX_PROMPTS} in all.", "n")
    asks = [
        Ask(prompt=service.prompts.checked(prompt, "prompt"), num_answers=count, **shared)
        for prompt in prompts
    ]
    return [one for ask in asks for one in repeated(ask, count)]


def _num_logprobs(fields: Fields) -> int | None:
    value = fields.any("logprobs")
    if isinstance(value, bool):
        return 0 if value else None
    return fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)


def _read_prompts(service: Service, prompt: Any) -> list[list[int]]:
    """Each prompt's ids: one text, several, one list of ids, or several."""
    if prompt is None:
        raise refused("'prompt' is missing.", "prompt")
    many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if len(many) > MAX_PROMPTS:
        raise refused(f"There are more than {MAX_PROMPTS} prompts.", "prompt")
    return [ids_of(service, one) for one in many]


def ids_of(service: Service, prompt: Any) -> list[int]:
    """The ids of one text, or of a list of ids. Raises ApiError."""
    if isinstance(prompt, str):
        return service.prompts.tokens(prompt, special=True)
    ids = token_ids(prompt)
    if ids is None:
        raise refused(
            "'prompt' must be text, a list of token ids, or a list of such.", "prompt", "invalid_type"
        )
    try:
        return [int(one) for one in checked_ids(ids, service.core.vocab_size)]
    except KrasisError as error:
        raise from_krasis(error, "prompt") from error


class CompletionStream:
    """Texts in chunks, each as its tokens come."""

    def __init__(self, options: Options, turns: Sequence[Turn], service: Service) -> None:
        self._options, self._turns, self._service = options, turns, service
        self._choices = [ChoiceChunks(options, turn, service, index) for index, turn in enumerate(turns)]

    async def frames(self) -> AsyncIterator[bytes]:
        """The events."""
        more = {"usage": None} if self._options.include_usage else {}
        ends: list[tuple[int, End]] = []
        try:
            if self._options.echo:
                for index, turn in enumerate(self._turns):
                    yield data_event(_chunk(self._options, _echo(self._service, turn), index=index) | more)
            async with aclosing(merged(self._turns)) as steps:
                async for index, step in steps:
                    for value in self._choices[index].step(step):
                        yield data_event(value | more)
                    if isinstance(step, End):
                        ends.append((index, step))
            if self._options.include_usage:
                end = _sum([end for _, end in sorted(ends, key=lambda one: one[0])], self._turns)
                usage = {"usage": openai_usage(end), "timings": timings(end)}
                yield data_event({**self._options.shared(), "choices": [], **usage})
        except ApiError as error:
            yield data_event(error.openai())
        except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
            self._turns[0].log_failure()
            yield data_event(internal().openai())
        finally:
            self.close()
        yield DONE

    def close(self) -> None:
        """Lets go of all answers."""
        for turn in self._turns:
            turn.close()


class ChoiceChunks:
    """The chunks of one text."""

    def __init__(self, options: Options, turn: Turn, service: Service, index: int) -> None:
        self._options, self._turn, self._service, self._index = options, turn, service, index
        self._table = Table()

    def step(self, step: Step) -> Sequence[dict[str, Any]]:
        """What one step adds."""
        if isinstance(step, Text):
            return [_chunk(self._options, step.text, self._scores(), index=self._index)]
        if isinstance(step, PromptScored):
            self._table.add_prompt(step, self._service, self._turn.ask)
        elif isinstance(step, Scores):
            self._table.add(step.tokens)
        elif isinstance(step, End):
            last = _chunk(self._options, "", self._scores(), finish_reason(step), self._index)
            return [last | {"timings": timings(step)}]
        return []

    def _scores(self) -> dict[str, Any] | None:
        if not self._options.logprobs:
            return None
        found, self._table = self._table.shown(), Table(self._table.offset)
        return found


def _chunk(
    options: Options,
    text: str,
    scores: dict[str, Any] | None = None,
    finish: str | None = None,
    index: int = 0,
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": finish}
    return {**options.shared(), "choices": [choice]}


class Table:
    """Log probabilities as completions have them: columns beside each other."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self._rows: list[tuple[str, TokenScore | None, int]] = []

    def add(self, tokens: Sequence[TokenScore]) -> None:
        """Tokens of the answer."""
        for one in tokens:
            self._add(one.text, one)

    def add_prompt(self, scored: PromptScored, service: Service, ask: Ask) -> None:
        """The prompt's tokens."""
        for token, one in zip(ask.prompt, scored.tokens, strict=True):
            self._add(service.token_text(token), one)

    def _add(self, text: str, score: TokenScore | None) -> None:
        self._rows.append((text, score, self.offset))
        self.offset += len(text)

    def shown(self) -> dict[str, Any]:
        """The columns."""
        return {
            "tokens": [text for text, _, _ in self._rows],
            "token_logprobs": [None if one is None else one.logprob for _, one, _ in self._rows],
            "top_logprobs": [None if one is None else _top(one) for _, one, _ in self._rows],
            "text_offset": [offset for _, _, offset in self._rows],
        }


def _top(score: TokenScore) -> dict[str, float]:
    found: dict[str, float] = {}
    for text, _, logprob in score.top:
        found.setdefault(text, logprob)
    found.setdefault(score.text, score.logprob)
    return found


async def _whole(options: Options, turns: Sequence[Turn], service: Service) -> dict[str, Any]:
    texts = [[_echo(service, turn)] if options.echo else [] for turn in turns]
    tables = [Table() for _ in turns]
    ends: dict[int, End] = {}
    async with aclosing(merged(turns)) as steps:
        async for index, step in steps:
            if isinstance(step, Text):
                texts[index].append(step.text)
            elif isinstance(step, PromptScored):
                tables[index].add_prompt(step, service, turns[index].ask)
            elif isinstance(step, Scores):
                tables[index].add(step.tokens)
            elif isinstance(step, End):
                ends[index] = step
    if len(ends) < len(turns):
        raise internal()
    in_order = [ends[index] for index in range(len(turns))]
    choices = [
        {
            "index": index,
            "text": "".join(texts[index]),
            "logprobs": tables[index].shown() if options.logprobs else None,
            "finish_reason": finish_reason(end),
        }
        for index, end in enumerate(in_order)
    ]
    end = _sum(in_order, turns)
    return {**options.shared(), "choices": choices, "usage": openai_usage(end), "timings": timings(end)}


def _echo(service: Service, turn: Turn) -> str:
    return service.prompts.assets.tokenizer.decode(turn.ask.prompt, skip_special=False)


def finish_reason(end: End) -> str:
    """OpenAI's word."""
    return "length" if end.reason == "length" else "stop"


def _sum(ends: Sequence[End], turns: Sequence[Turn]) -> End:
    """The end of all answers: each prompt counts once."""
    count = turns[0].ask.num_answers
    each = [joined(ends[at : at + count]) for at in range(0, len(ends), count)]
    return replace(
        joined(each),
        num_prompt_tokens=sum(one.num_prompt_tokens for one in each),
        num_cached_tokens=sum(one.num_cached_tokens for one in each),
    )


__all__ = ["Call", "completions"]
