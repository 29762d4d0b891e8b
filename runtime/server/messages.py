"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic describes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.runtime.server import anthropic
from krasis.runtime.server.ask import Ask, make_ask
from krasis.runtime.server.continuing import is_begun
from krasis.runtime.server.errors import ApiError, internal
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.sampling import read_max_tokens, read_sampling, read_stops
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.tools.choice import ToolChoice
from krasis.runtime.server.turn import End, Step, Turn
from krasis.runtime.server.usage import anthropic_usage
from krasis.runtime.server.wire import json_response, named_event
from krasis.runtime.text.thinking import REASONING


async def messages(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    stream = fields.flag("stream")
    ask = await service.in_thread(_read_ask, service, fields)
    turn = service.begin(ask, request)
    number = ask.number("msg_")
    if stream:
        writer = MessageStream(number, ask, turn)
        return EventStream(
            with_keepalive(writer.frames(), service.settings.ping_interval_s, writer.no_op), turn.close
        )
    return json_response(await service.whole(request, [turn], whole_message(number, ask, turn)))


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    service = service_of(request)
    fields = Fields(await service.read(request))

    def count() -> int:
        rows = anthropic.read_conversation(fields)
        text = service.prompts.text(
            rows,
            anthropic.read_tools(fields),
            think=anthropic.read_think(fields),
            goes_on=is_begun(rows),
        )
        return len(service.prompts.tokens(text))

    return json_response({"input_tokens": await service.in_thread(count), "context_management": None})


def _read_ask(service: Service, fields: Fields) -> Ask:
    kind, name = anthropic.read_choice(fields)
    tools = anthropic.read_tools(fields)
    rows = anthropic.read_conversation(fields)
    return make_ask(
        service,
        fields,
        messages=rows,
        goes_on=is_begun(rows),
        choice=ToolChoice.checked(tools, kind, name),
        think=anthropic.read_think(fields),
        variables=fields.mapping("chat_template_kwargs"),
        sampling=read_sampling(fields, service.sampling),
        max_tokens=read_max_tokens(fields),
        stops=read_stops(fields, "stop_sequences"),
    )


class MessageStream:
    """An answer in Anthropic's events: blocks of thinking, text and tool use, one after the other."""

    def __init__(self, number: str, ask: Ask, turn: Turn) -> None:
        self._ask, self._turn = ask, turn
        self._message = _message(number, ask.model, [], anthropic_usage(len(ask.prompt), 0, 0))
        self._index = -1
        self._open = ""  # the kind of the block that is open
        self._num_calls = 0

    async def frames(self) -> AsyncIterator[bytes]:
        """The events."""
        yield named_event({"type": "message_start", "message": self._message})
        yield named_event({"type": "ping"})
        try:
            async with aclosing(self._turn.steps()) as steps:
                async for step in steps:
                    for frame in self._step(step):
                        yield frame
        except ApiError as error:
            yield named_event(error.anthropic())
        except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
            self._turn.log_failure()
            yield named_event(internal().anthropic())
        finally:
            self._turn.close()

    def no_op(self) -> bytes:
        """An empty delta in the open block: its clients do not take a ping for life."""
        frames = [] if self._open else list(self._begin("thinking" if self._ask.thinks else "text"))
        return b"".join([*frames, self._delta("")])

    def _step(self, step: Step) -> Iterator[bytes]:
        if isinstance(step, Text):
            yield from self._begin("thinking" if step.kind == REASONING else "text")
            yield self._delta(step.text)
        elif isinstance(step, Call):
            self._num_calls += 1
            yield from self._end_block()
            block = {
                "type": "tool_use",
                "id": self._turn.remember(step, "toolu_"),
                "name": step.name,
                "input": {},
            }
            yield self._start({**block, "caller": {"type": "direct"}})
            yield self._event(
                "content_block_delta", delta={"type": "input_json_delta", "partial_json": step.arguments}
            )
            yield self._event("content_block_stop")
        elif isinstance(step, End):
            if self._index < 0:
                yield from self._begin("text")
            yield from self._end_block()
            reason, sequence = stop_reason(step, self._num_calls)
            usage = anthropic_usage(step.num_prompt_tokens, step.num_cached_tokens, step.num_generated_tokens)
            delta = {
                "stop_reason": reason,
                "stop_sequence": sequence,
                "container": None,
                "stop_details": None,
            }
            yield named_event(
                {"type": "message_delta", "delta": delta, "usage": usage, "context_management": None}
            )
            yield named_event({"type": "message_stop"})

    def _begin(self, kind: str) -> Iterator[bytes]:
        if self._open == kind:
            return
        yield from self._end_block()
        block = {"type": "thinking", "thinking": "", "signature": ""}
        if kind == "text":
            block = {"type": "text", "text": "", "citations": None}  # type: ignore[dict-item]
        yield self._start(block)
        self._open = kind

    def _start(self, block: dict[str, Any]) -> bytes:
        self._index += 1
        return self._event("content_block_start", content_block=block)

    def _delta(self, text: str) -> bytes:
        kind, key = ("thinking_delta", "thinking") if self._open == "thinking" else ("text_delta", "text")
        return self._event("content_block_delta", delta={"type": kind, key: text})

    def _end_block(self) -> Iterator[bytes]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._event(
                "content_block_delta", delta={"type": "signature_delta", "signature": SIGNATURE}
            )
        yield self._event("content_block_stop")
        self._open = ""

    def _event(self, kind: str, **more: Any) -> bytes:
        return named_event({"type": kind, "index": self._index, **more})


SIGNATURE = "a3Jhc2lz"  # clients send it back unseen; nothing is signed here


async def whole_message(number: str, ask: Ask, turn: Turn) -> dict[str, Any]:
    """An answer in one piece."""
    blocks: list[dict[str, Any]] = []
    calls = 0
    async with aclosing(turn.steps()) as steps:
        async for step in steps:
            if isinstance(step, Text):
                kind = "thinking" if step.kind == REASONING else "text"
                if not blocks or blocks[-1]["type"] != kind:
                    blocks.append(_block(kind))
                blocks[-1][kind] += step.text
            elif isinstance(step, Call):
                calls += 1
                use = {"type": "tool_use", "id": turn.remember(step, "toolu_"), "name": step.name}
                blocks.append({**use, "input": turn.arguments(step), "caller": {"type": "direct"}})
            elif isinstance(step, End):
                reason, sequence = stop_reason(step, calls)
                usage = anthropic_usage(
                    step.num_prompt_tokens, step.num_cached_tokens, step.num_generated_tokens
                )
                message = _message(number, ask.model, blocks or [_block("text")], usage)
                return {**message, "stop_reason": reason, "stop_sequence": sequence}
    raise internal()


def _block(kind: str) -> dict[str, Any]:
    if kind == "thinking":
        return {"type": "thinking", "thinking": "", "signature": SIGNATURE}
    return {"type": "text", "text": "", "citations": None}


def _message(number: str, model: str, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "context_management": None,
        "usage": usage,
    }


def stop_reason(end: End, num_calls: int) -> tuple[str, str | None]:
    """Anthropic's word, and the stop text that was met."""
    if end.reason == "length":
        return "max_tokens", None
    if num_calls:
        return "tool_use", None
    return ("stop_sequence", end.stop_text) if end.stop_text is not None else ("end_turn", None)
