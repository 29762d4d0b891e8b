"""POST /v1/chat/completions, as OpenAI describes it and llama.cpp extends it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.runtime.server.ask import Ask, read_chat_ask
from krasis.runtime.server.errors import ApiError, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.native_settings import generation_settings
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.several import joined, merged, read_num_answers, repeated
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.turn import End, Making, Scores, Step, Turn
from krasis.runtime.server.usage import FINGERPRINT, openai_usage, timings
from krasis.runtime.server.wire import DONE, data_event, json_response
from krasis.runtime.text.thinking import ANSWER


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How the answer is to be written."""

    stream: bool
    include_usage: bool
    return_progress: bool
    logprobs: bool
    timings_per_token: bool
    is_verbose: bool

    @classmethod
    def read(cls, fields: Fields, is_verbose: bool) -> ChatOptions:
        """is_verbose: unless the request says otherwise. Raises ApiError."""
        stream = fields.flag("stream")
        options = fields.object("stream_options")
        if options is not None and not stream:
            raise refused("'stream_options' needs 'stream': true.", "stream_options")
        usage = options is not None and options.flag("include_usage")
        return cls(
            stream,
            usage,
            fields.flag("return_progress"),
            fields.flag("logprobs"),
            fields.flag("timings_per_token"),
            fields.flag("verbose", is_verbose),
        )


async def chat_completions(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    body = await service.read(request)
    fields = Fields(body)
    options = ChatOptions.read(fields, service.settings.is_verbose)
    count = read_num_answers(fields)
    ask = await service.in_thread(read_chat_ask, service, fields)
    head = ChatHead(ask.number("chatcmpl-"), ask.model)
    more = {"__verbose": _verbose(service, ask)} if options.is_verbose else {}
    turns = service.begin_all(repeated(ask, count), request)
    if options.stream:
        answer = ChatStream(head, options, turns)
        stream = with_keepalive(answer.frames(), service.settings.ping_interval_s, head.no_op)
        return EventStream(stream, answer.close)
    found = await service.whole(request, turns, whole_answer(head, options, turns))
    return json_response({**found, **more})


def _verbose(service: Service, ask: Ask) -> dict[str, Any]:
    """What the model is really asked: for those who look for a fault in a template."""
    assets = service.prompts.assets
    settings = generation_settings(ask.sampling, ask, assets.end_tokens.ids)
    prompt = assets.tokenizer.decode(ask.prompt, skip_special=False)
    return {"prompt": prompt, "generation_settings": settings}


@dataclass(frozen=True, slots=True)
class ChatHead:
    """What all chunks of an answer have in common."""

    number: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(
        self, delta: dict[str, Any] | None, finish: str | None = None, index: int = 0, **more: Any
    ) -> bytes:
        """One chunk of the answer with that index; delta None: one without choices."""
        choices: list[dict[str, Any]] = []
        if delta is not None:
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": more.pop("logprobs", None),
                "finish_reason": finish,
            }
            choices.append(choice)
        return data_event({**self.shared("chat.completion.chunk"), "choices": choices, **more})

    def shared(self, kind: str) -> dict[str, Any]:
        """Fields of every object of this answer."""
        return {
            "id": self.number,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def no_op(self) -> bytes:
        """What keeps a stream alive."""
        return self.chunk({})


class ChatStream:
    """Answers in chunks, each as its tokens come."""

    def __init__(self, head: ChatHead, options: ChatOptions, turns: Sequence[Turn]) -> None:
        self._head, self._options, self._turns = head, options, turns
        self._more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        self._choices = [ChoiceChunks(head, options, turn, index) for index, turn in enumerate(turns)]

    async def frames(self) -> AsyncIterator[bytes]:
        """The events. An error after the first is an event too."""
        for index in range(len(self._turns)):
            yield self._head.chunk({"role": "assistant", "content": None}, index=index, **self._more)
        ends: list[End] = []
        try:
            async with aclosing(merged(self._turns)) as steps:
                async for index, step in steps:
                    for frame in self._choices[index].step(step):
                        yield frame
                    if isinstance(step, End):
                        ends.append(step)
            if self._options.include_usage:
                end = joined(ends)
                yield self._head.chunk(None, usage=openai_usage(end), timings=timings(end))
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
    """The chunks of one answer."""

    def __init__(self, head: ChatHead, options: ChatOptions, turn: Turn, index: int) -> None:
        self._head, self._options, self._turn, self._index = head, options, turn, index
        self._more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        self._num_calls = 0
        self._scores: list[dict[str, Any]] = []

    def step(self, step: Step) -> Sequence[bytes]:
        """What one step adds."""
        if isinstance(step, Text):
            key = "content" if step.kind == ANSWER else "reasoning_content"
            return [self._chunk({key: step.text})]
        if isinstance(step, Call):
            return self._call(step)
        if isinstance(step, Scores):
            self._scores += chat_scores(step)
            return []
        if isinstance(step, Making):
            return self._progress(step)
        return self._ending(step) if isinstance(step, End) else []

    def _progress(self, step: Making) -> Sequence[bytes]:
        if not self._options.return_progress:
            return []
        return [self._head.chunk({}, index=self._index, prompt_progress=step.llama_cpp())]

    def _ending(self, step: End) -> Sequence[bytes]:
        frames = []
        if self._scores and self._options.logprobs:
            frames.append(self._chunk({"content": ""}))
        reason = finish_reason(step, self._num_calls)
        frames.append(self._head.chunk({}, reason, self._index, timings=timings(step), **self._more))
        return frames

    def _call(self, call: Call) -> Sequence[bytes]:
        index, self._num_calls = self._num_calls, self._num_calls + 1
        number = self._turn.remember(call)
        function = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": number, "type": "function", "function": function}
        rest = {"index": index, "function": {"arguments": call.arguments}}
        return [self._chunk({"tool_calls": [first]}), self._chunk({"tool_calls": [rest]})]

    def _chunk(self, delta: dict[str, Any]) -> bytes:
        more: dict[str, Any] = dict(self._more)
        if self._options.logprobs and self._scores:
            more["logprobs"] = {"content": self._scores, "refusal": None}
            self._scores = []
        if self._options.timings_per_token:
            more["timings"] = timings(self._turn.so_far())
        return self._head.chunk(delta, index=self._index, **more)


async def whole_answer(head: ChatHead, options: ChatOptions, turns: Sequence[Turn]) -> dict[str, Any]:
    """Answers in one piece."""
    steps: list[list[Step]] = [[] for _ in turns]
    async with aclosing(merged(turns)) as coming:
        async for index, step in coming:
            steps[index].append(step)
    ends, choices = [], []
    for index, (turn, own) in enumerate(zip(turns, steps, strict=True)):
        choice, end = _choice(options, turn, own, index)
        ends.append(end)
        choices.append(choice)
    end, shared = joined(ends), head.shared("chat.completion")
    return {**shared, "choices": choices, "usage": openai_usage(end), "timings": timings(end)}


def _choice(
    options: ChatOptions, turn: Turn, steps: Sequence[Step], index: int
) -> tuple[dict[str, Any], End]:
    texts: dict[str, list[str]] = {"answer": [], "reasoning": []}
    calls: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    end: End | None = None
    for step in steps:
        if isinstance(step, Text):
            texts[step.kind].append(step.text)
        elif isinstance(step, Call):
            function = {"name": step.name, "arguments": step.arguments}
            calls.append({"id": turn.remember(step), "type": "function", "function": function})
        elif isinstance(step, Scores):
            scores += chat_scores(step)
        elif isinstance(step, End):
            end = step
    if end is None:
        raise internal()
    answer, thoughts = "".join(texts["answer"]), "".join(texts["reasoning"])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer if answer or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": index,
        "message": message,
        "logprobs": {"content": scores, "refusal": None} if options.logprobs else None,
        "finish_reason": finish_reason(end, len(calls)),
    }
    return choice, end


def finish_reason(end: End, num_calls: int) -> str:
    """OpenAI's word."""
    if end.reason == "length":
        return "length"
    return "tool_calls" if num_calls else "stop"


def chat_scores(scores: Scores) -> list[dict[str, Any]]:
    """Log probabilities of tokens, as chat has them."""
    return [
        {**_score(one.text, one.data, one.logprob), "top_logprobs": [_score(*other) for other in one.top]}
        for one in scores.tokens
    ]


def _score(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(data)}


__all__ = ["Ask", "ChatHead", "chat_completions"]
