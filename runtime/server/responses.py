"""POST /v1/responses, as OpenAI describes it: without memory, the client sends the whole conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.runtime.server.ask import Ask, make_ask, read_effort
from krasis.runtime.server.errors import ApiError, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.grammar import read_response_format
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.response_items import read_input
from krasis.runtime.server.response_objects import ResponseObject, Writer
from krasis.runtime.server.sampling import read_max_tokens, read_sampling, read_stops
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.tools.choice import read_tools
from krasis.runtime.server.turn import Turn
from krasis.runtime.server.wire import json_response, named_event


async def responses(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    for name in ("previous_response_id", "conversation"):
        if fields.has(name):
            raise refused(
                f"'{name}' is not supported: this server keeps no conversations; replay the input.", name
            )
    if fields.flag("background"):
        raise refused("'background' is not supported.", "background")
    stream = fields.flag("stream")
    extras = {"progress": fields.flag("return_progress"), "has_timings": fields.flag("timings_per_token")}
    ask = await service.in_thread(_read_ask, service, fields)
    turn = service.begin(ask, request)
    answer = ResponseObject(fields, ask)
    if stream:
        answering = ResponseStream(turn, Writer(answer, turn, **extras), answer)
        return EventStream(
            with_keepalive(answering.frames(), service.settings.ping_interval_s, answering.no_op), turn.close
        )
    return json_response(await service.whole(request, [turn], _whole(answer, turn)))


async def input_tokens(request: Request) -> Response:
    """How many tokens an input has."""
    service = service_of(request)
    fields = Fields(await service.read(request))

    def count() -> int:
        rows = read_input(fields)
        return len(service.prompts.tokens(service.prompts.text(rows, read_tools(fields).tools)))

    return json_response({"object": "response.input_tokens", "input_tokens": await service.in_thread(count)})


def _read_ask(service: Service, fields: Fields) -> Ask:
    text = fields.object("text")
    return make_ask(
        service,
        fields,
        messages=read_input(fields),
        choice=read_tools(fields),
        think=read_effort(fields),
        variables=fields.mapping("chat_template_kwargs"),
        sampling=read_sampling(fields, service.sampling),
        max_tokens=read_max_tokens(fields),
        stops=read_stops(fields),
        grammar=None if text is None else read_response_format(text, "format"),
    )


class ResponseStream:
    """An answer in the events of responses."""

    def __init__(self, turn: Turn, writer: Writer, answer: ResponseObject) -> None:
        self._turn, self._writer, self._answer = turn, writer, answer
        self._number = 0

    async def frames(self) -> AsyncIterator[bytes]:
        """The events."""
        yield self._event({"type": "response.created", "response": self._answer.shown()})
        yield self._event({"type": "response.in_progress", "response": self._answer.shown()})
        try:
            async with aclosing(self._turn.steps()) as steps:
                async for step in steps:
                    for event in self._writer.step(step):
                        yield self._event(event)
        except ApiError as error:
            yield self._event({"type": "response.failed", "response": self._answer.failed(error)})
        except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
            self._turn.log_failure()
            yield self._event({"type": "response.failed", "response": self._answer.failed(internal())})
        finally:
            self._turn.close()

    def no_op(self) -> bytes:
        """What keeps a stream alive."""
        return self._event({"type": "response.in_progress", "response": self._answer.shown()})

    def _event(self, value: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event({**value, "sequence_number": number})


async def _whole(answer: ResponseObject, turn: Turn) -> dict[str, Any]:
    writer = Writer(answer, turn)
    async with aclosing(turn.steps()) as steps:
        async for step in steps:
            for _ in writer.step(step):
                pass
    return answer.shown()
