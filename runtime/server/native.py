"""POST /completion, llama.cpp's own form of a text that goes on: its scripts and editors' plug-ins ask so."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.runtime.server.ask import Ask, read_slot
from krasis.runtime.server.completions import MAX_PROMPTS, ids_of
from krasis.runtime.server.errors import ApiError, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.grammar import read_response_format
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.native_settings import generation_settings
from krasis.runtime.server.sampling import (
    MAX_TOP_LOGPROBS,
    read_bias,
    read_max_tokens,
    read_sampling,
    read_stops,
)
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.several import merged, read_num_answers, repeated
from krasis.runtime.server.tools.calls import Text
from krasis.runtime.server.turn import End, Making, Picked, Scores, Step, TokenScore, Turn
from krasis.runtime.server.usage import timings, timings_while
from krasis.runtime.server.wire import data_event, json_response

_STOP_TYPES = {"end": "eos", "stop": "word", "length": "limit"}


@dataclass(frozen=True, slots=True)
class NativeOptions:
    """How the answer is to be written. fields: of the answer, those that are wanted; none: all."""

    stream: bool
    return_tokens: bool
    return_progress: bool
    timings_per_token: bool
    fields: tuple[str, ...]

    @classmethod
    def read(cls, fields: Fields) -> NativeOptions:
        """Raises ApiError."""
        wanted = fields.items("response_fields") or ()
        if not all(isinstance(one, str) for one in wanted):
            raise fields.wrong("response_fields", "a list of strings")
        return cls(
            fields.flag("stream"),
            fields.flag("return_tokens"),
            fields.flag("return_progress"),
            fields.flag("timings_per_token"),
            tuple(wanted),
        )


async def native_completion(request: Request) -> Response:
    """The endpoint. Several prompts get a list of answers."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    options = NativeOptions.read(fields)
    asks = await service.in_thread(_read_asks, service, fields)
    turns = service.begin_all(asks, request)
    answers = [NativeAnswer(service, turn, index, options) for index, turn in enumerate(turns)]
    if options.stream:
        stream = NativeStream(turns, answers)
        no_op = answers[0].no_op
        return EventStream(
            with_keepalive(stream.frames(), service.settings.ping_interval_s, no_op), stream.close
        )
    found = await service.whole(request, turns, _whole(turns, answers))
    return json_response(found if len(found) > 1 else found[0])


def _read_asks(service: Service, fields: Fields) -> list[Ask]:
    count = read_num_answers(fields)
    prompts = [service.prompts.checked(one, "prompt") for one in _read_prompts(service, fields.any("prompt"))]
    if len(prompts) * count > MAX_PROMPTS:
        raise refused(f"There are more than {MAX_PROMPTS} answers to give.", "prompt")
    grammar = read_response_format(fields)
    grammar = service.grammars.check(grammar)
    num_probs = fields.integer("n_probs", 0, MAX_TOP_LOGPROBS)

    def words(text: str) -> list[int]:
        return service.prompts.tokens(text)

    shared: dict[str, Any] = {
        "model": service.model_name(fields.any("model")),
        "sampling": read_sampling(fields, service.sampling),
        "max_tokens": read_max_tokens(fields, least=0),
        "stops": read_stops(fields),
        "bias": read_bias(fields, service.core.vocab_size, words),
        "num_logprobs": num_probs or None,
        "grammar": grammar,
        "is_plain": True,
        "ignore_ends": fields.flag("ignore_eos"),
        "use_cache": fields.flag("cache_prompt", True),
        "wants_tokens": True,
        "sampled_logprobs": fields.flag("post_sampling_probs"),
        "slot": read_slot(fields),
    }
    asks = [Ask(prompt=prompt, num_answers=count, **shared) for prompt in prompts]
    return [one for ask in asks for one in repeated(ask, count)]


def _read_prompts(service: Service, prompt: Any) -> list[list[int]]:
    """Each prompt's ids. One prompt: a text, an object with ``prompt_string``, or a list of ids and texts;
    several: a list of prompts."""
    if isinstance(prompt, list) and prompt and not any(isinstance(one, int) for one in prompt):
        if len(prompt) > MAX_PROMPTS:
            raise refused(f"There are more than {MAX_PROMPTS} prompts.", "prompt")
        return [_mixed_ids(service, one) for one in prompt]
    return [_mixed_ids(service, prompt)]


def _mixed_ids(service: Service, prompt: Any) -> list[int]:
    if isinstance(prompt, Mapping):
        if prompt.get("multimodal_data"):
            raise refused("'prompt': this model reads text only.", "prompt")
        prompt = prompt.get("prompt_string")
    if isinstance(prompt, list) and any(isinstance(one, str) for one in prompt):
        return [token for one in prompt for token in ids_of(service, one if isinstance(one, str) else [one])]
    return ids_of(service, prompt)


class NativeAnswer:
    """One answer as it grows, and its events."""

    def __init__(self, service: Service, turn: Turn, index: int, options: NativeOptions) -> None:
        self._service, self._turn, self._index, self._options = service, turn, index, options
        self._slot = -1 if turn.ask.slot is None else turn.ask.slot
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._scores: list[dict[str, Any]] = []
        self._sent = 0  # tokens whose events were sent

    def step(self, step: Step) -> list[dict[str, Any]]:
        """The events of one step: one a token."""
        if isinstance(step, Scores):
            self._scores += [self._scored(one) for one in step.tokens]
        elif isinstance(step, Picked):
            self._tokens += step.tokens
        elif isinstance(step, Text):
            self._texts.append(step.text)
            return [self._part(step.text)]
        elif isinstance(step, Making):
            return self._progress(step)
        elif isinstance(step, End):
            ready = [self._part("")] if self._sent < len(self._tokens) else []
            return [*ready, self.whole(step, content="")]
        return []

    def no_op(self) -> bytes:
        """What keeps a stream alive."""
        return data_event(
            {"index": self._index, "content": "", "tokens": [], "stop": False, "id_slot": self._slot}
        )

    def _empty(self) -> dict[str, Any]:
        return {"index": self._index, "content": "", "tokens": [], "stop": False, "id_slot": self._slot}

    def _part(self, text: str) -> dict[str, Any]:
        tokens, self._sent = self._tokens[self._sent :], len(self._tokens)
        part: dict[str, Any] = {
            "index": self._index,
            "content": text,
            "tokens": tokens,
            "stop": False,
            "id_slot": self._slot,
            "tokens_predicted": len(self._tokens),
            "tokens_evaluated": len(self._turn.ask.prompt),
        }
        if self._turn.ask.num_logprobs is not None:
            part["completion_probabilities"] = self._scores[self._sent - len(tokens) :]
        if self._options.timings_per_token:
            part["timings"] = timings(self._turn.so_far())
        return part

    def _progress(self, step: Making) -> list[dict[str, Any]]:
        if not self._options.return_progress:
            return []
        more = {"timings": timings_while(step)} if self._options.timings_per_token else {}
        return [{**self._empty(), "prompt_progress": step.llama_cpp(), **more}]

    def whole(self, end: End, content: str | None = None) -> dict[str, Any]:
        """The object at the end. content: None: the whole text."""
        ask = self._turn.ask
        text = "".join(self._texts)
        found: dict[str, Any] = {
            "index": self._index,
            "content": text if content is None else content,
            "tokens": self._tokens if self._options.return_tokens and content is None else [],
            "id_slot": self._slot,
            "stop": True,
            "model": ask.model,
            "tokens_predicted": end.num_generated_tokens,
            "tokens_evaluated": end.num_prompt_tokens,
            "generation_settings": generation_settings(
                ask.sampling, ask, self._service.prompts.assets.end_tokens.ids
            ),
            "prompt": self._service.prompts.assets.tokenizer.decode(ask.prompt, skip_special=False),
            "has_new_line": "\n" in text,
            "truncated": end.is_full,
            "stop_type": _STOP_TYPES.get(end.reason, "none"),
            "stopping_word": end.stop_text or "",
            "tokens_cached": end.num_prompt_tokens + max(end.num_generated_tokens - 1, 0),
            "timings": timings(end),
        }
        if ask.num_logprobs is not None and content is None:
            found["completion_probabilities"] = self._scores
        return _chosen(found, self._options.fields)

    def _scored(self, score: TokenScore) -> dict[str, Any]:
        is_sampled = self._turn.ask.sampled_logprobs

        def shown(token: int, text: str, data: bytes, logprob: float) -> dict[str, Any]:
            value = {"prob": math.exp(logprob)} if is_sampled else {"logprob": logprob}
            return {"id": token, "token": text, "bytes": list(data), **value}

        top = [shown(token, *other) for token, other in zip(score.top_tokens, score.top, strict=True)]
        found = shown(score.token, score.text, score.data, score.logprob)
        return {**found, "top_probs" if is_sampled else "top_logprobs": top}


def _chosen(found: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """The fields that are wanted, those of inner objects by ``outer/inner``."""
    if not wanted:
        return found
    chosen = {}
    for path in wanted:
        value: Any = found
        for name in path.split("/"):
            value = value.get(name, found) if isinstance(value, dict) else found
        if value is not found:
            chosen[path] = value
    return chosen


@dataclass(slots=True)
class NativeStream:
    """Answers in events; there is no ``[DONE]``."""

    turns: Sequence[Turn]
    answers: Sequence[NativeAnswer]

    async def frames(self) -> AsyncIterator[bytes]:
        """The events."""
        try:
            async with aclosing(merged(self.turns)) as steps:
                async for index, step in steps:
                    for event in self.answers[index].step(step):
                        yield data_event(event)
        except ApiError as error:
            yield data_event(error.openai())
        except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
            self.turns[0].log_failure()
            yield data_event(internal().openai())
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of all answers."""
        for turn in self.turns:
            turn.close()


async def _whole(turns: Sequence[Turn], answers: Sequence[NativeAnswer]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    async with aclosing(merged(turns)) as steps:
        async for index, step in steps:
            if isinstance(step, End):
                found[index] = answers[index].whole(step)
            else:
                answers[index].step(step)
    if len(found) < len(turns):
        raise internal()
    return [found[index] for index in range(len(turns))]
