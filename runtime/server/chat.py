"""POST /v1/chat/completions, as OpenAI describes it and llama.cpp extends it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.process.tool import tool_version
from krasis.runtime.server.ask import Ask, read_chat_ask
from krasis.runtime.server.errors import ApiError, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.service import service_of
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.turn import End, Making, Scores, Step, Turn
from krasis.runtime.server.usage import openai_usage, timings
from krasis.runtime.server.wire import DONE, data_event, json_response
from krasis.runtime.text.thinking import ANSWER


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How the answer is to be written."""

    stream: bool
    include_usage: bool
    return_progress: bool
    logprobs: bool

    @classmethod
    def read(cls, fields: Fields) -> ChatOptions:
        """Raises ApiError."""
        stream = fields.flag("stream")
        options = fields.object("stream_options")
        if options is not None and not stream:
            raise refused("'stream_options' needs 'stream': true.", "stream_options")
        usage = options is not None and options.flag("include_usage")
        return cls(stream, usage, fields.flag("return_progress"), fields.flag("logprobs"))


async def chat_completions(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    body = await service.read(request)
    fields = Fields(body)
    options = ChatOptions.read(fields)
    ask = await service.in_thread(read_chat_ask, service, fields)
    head = ChatHead(ask.number("chatcmpl-"), ask.model)
    turn = service.begin(ask, request)
    if options.stream:
        frames = ChatStream(head, options, turn).frames()
        return EventStream(with_keepalive(frames, service.settings.ping_interval_s, head.no_op), turn.close)
    return json_response(await service.whole(request, turn, whole_answer(head, options, turn)))


@dataclass(frozen=True, slots=True)
class ChatHead:
    """What all chunks of an answer have in common."""

    number: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
        """One chunk; delta None: one without choices."""
        choices: list[dict[str, Any]] = []
        if delta is not None:
            choice = {
                "index": 0,
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
            "system_fingerprint": f"build-krasis-{tool_version()}",
        }

    def no_op(self) -> bytes:
        """What keeps a stream alive."""
        return self.chunk({})


class ChatStream:
    """An answer in chunks."""

    def __init__(self, head: ChatHead, options: ChatOptions, turn: Turn) -> None:
        self._head, self._options, self._turn = head, options, turn
        self._more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        self._num_calls = 0
        self._scores: list[dict[str, Any]] = []

    async def frames(self) -> AsyncIterator[bytes]:
        """The events. An error after the first is an event too."""
        yield self._head.chunk({"role": "assistant", "content": ""}, **self._more)
        try:
            async with aclosing(self._turn.steps()) as steps:
                async for step in steps:
                    for frame in self._step(step):
                        yield frame
        except ApiError as error:
            yield data_event(error.openai())
        except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
            self._turn.log_failure()
            yield data_event(internal().openai())
        finally:
            self._turn.close()
        yield DONE

    def _step(self, step: Step) -> Sequence[bytes]:
        if isinstance(step, Text):
            key = "content" if step.kind == ANSWER else "reasoning_content"
            return [self._chunk({key: step.text})]
        if isinstance(step, Call):
            return self._call(step)
        if isinstance(step, Scores):
            self._scores += chat_scores(step)
            return []
        if isinstance(step, Making):
            return (
                [self._head.chunk({}, prompt_progress=step.llama_cpp())]
                if self._options.return_progress
                else []
            )
        return self._ending(step) if isinstance(step, End) else []

    def _ending(self, step: End) -> Sequence[bytes]:
        frames = []
        if self._scores and self._options.logprobs:
            frames.append(self._chunk({"content": ""}))
        frames.append(
            self._head.chunk({}, finish_reason(step, self._num_calls), timings=timings(step), **self._more)
        )
        if self._options.include_usage:
            frames.append(self._head.chunk(None, usage=openai_usage(step), timings=timings(step)))
        return frames

    def _call(self, call: Call) -> Sequence[bytes]:
        index, self._num_calls = self._num_calls, self._num_calls + 1
        number = self._turn.remember(call)
        function = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": number, "type": "function", "function": function}
        rest = {"index": index, "function": {"arguments": call.arguments}}
        return [self._chunk({"tool_calls": [first]}), self._chunk({"tool_calls": [rest]})]

    def _chunk(self, delta: dict[str, Any]) -> bytes:
        scores: dict[str, Any] = {}
        if self._options.logprobs and self._scores:
            scores = {"logprobs": {"content": self._scores, "refusal": None}}
            self._scores = []
        return self._head.chunk(delta, **scores, **self._more)


async def whole_answer(head: ChatHead, options: ChatOptions, turn: Turn) -> dict[str, Any]:
    """An answer in one piece."""
    texts = {"answer": "", "reasoning": ""}
    calls: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    end: End | None = None
    async with aclosing(turn.steps()) as steps:
        async for step in steps:
            if isinstance(step, Text):
                texts[step.kind] += step.text
            elif isinstance(step, Call):
                function = {"name": step.name, "arguments": step.arguments}
                calls.append({"id": turn.remember(step), "type": "function", "function": function})
            elif isinstance(step, Scores):
                scores += chat_scores(step)
            elif isinstance(step, End):
                end = step
    if end is None:
        raise internal()
    message: dict[str, Any] = {
        "role": "assistant",
        "content": texts["answer"] if texts["answer"] or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": scores, "refusal": None} if options.logprobs else None,
        "finish_reason": finish_reason(end, len(calls)),
    }
    shared = head.shared("chat.completion")
    return {**shared, "choices": [choice], "usage": openai_usage(end), "timings": timings(end)}


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
