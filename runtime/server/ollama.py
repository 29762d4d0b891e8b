"""Ollama's endpoints, for clients that speak nothing else: /api/chat, and what they look at before it.

A request becomes one of chat; an answer goes out in lines of JSON.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.process.tool import tool_version
from krasis.runtime.server.ask import read_chat_ask
from krasis.runtime.server.errors import ApiError, internal, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.keepalive import EventStream, with_keepalive
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.turn import End, Step, Turn
from krasis.runtime.server.wire import json_response
from krasis.runtime.text.thinking import ANSWER

_OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty"),
)


async def chat(request: Request) -> Response:
    """POST /api/chat."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    stream = fields.flag("stream", True)
    body = as_chat(fields)
    head = Head(service.model_name(fields.any("model")))
    if body["messages"] == []:  # so a client has a model loaded, which is loaded
        return json_response(head.line("", done=True, done_reason="load"))
    ask = await service.in_thread(read_chat_ask, service, Fields(body))
    turn = service.begin(ask, request)
    if not stream:
        found = await service.whole(request, [turn], _whole(head, turn))
        return json_response(found)
    lines = with_keepalive(_lines(head, turn), service.settings.ping_interval_s, lambda: _line(head.line("")))
    answer = EventStream(lines, turn.close)
    answer.headers["Content-Type"] = "application/x-ndjson"
    return answer


def as_chat(fields: Fields) -> dict[str, Any]:
    """The same request in OpenAI's form. Raises ApiError."""
    options = fields.object("options") or Fields({}, "options")
    given = {name: options.any(name) for name in _OPTIONS if options.has(name)}
    count = options.integer("num_predict")
    if count is not None and count >= 0:  # -1 and -2 are the end of the context
        given["max_tokens"] = count
    form = fields.any("format")
    if form == "json":
        given["response_format"] = {"type": "json_object"}
    elif isinstance(form, Mapping):
        given["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    elif form not in (None, ""):
        raise fields.wrong("format", "'json' or a JSON schema")
    think = fields.any("think")
    if think is not None:
        if not isinstance(think, bool | str):
            raise fields.wrong("think", "true, false or a level")
        given["reasoning_effort"] = think if isinstance(think, str) else "high" if think else "none"
    messages = [_message(one) for one in fields.items("messages") or ()]
    return {**given, "model": fields.any("model"), "messages": messages, "tools": fields.any("tools")}


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    if message.get("images"):
        raise refused("'messages' has images: this model reads text only.", "messages")
    changed = {key: value for key, value in message.items() if key not in ("images", "tool_name")}
    if isinstance(message.get("tool_name"), str):
        changed["name"] = message["tool_name"]
    return changed


@dataclass(frozen=True, slots=True)
class Head:
    """What all lines of an answer have in common."""

    model: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"))

    def line(self, content: str, *, done: bool = False, **more: Any) -> dict[str, Any]:
        """One line. more: of the message, where that knows it, else of the line."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        message |= {name: more.pop(name) for name in ("thinking", "tool_calls") if name in more}
        return {"model": self.model, "created_at": self.created, "message": message, "done": done, **more}


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


async def _lines(head: Head, turn: Turn) -> AsyncIterator[bytes]:
    """The lines. An error after the first is a line, too."""
    count = 0
    try:
        async with aclosing(turn.steps()) as steps:
            async for step in steps:
                if isinstance(step, Text):
                    is_answer = step.kind == ANSWER
                    more: dict[str, Any] = {} if is_answer else {"thinking": step.text}
                    yield _line(head.line(step.text if is_answer else "", **more))
                elif isinstance(step, Call):
                    yield _line(head.line("", tool_calls=[_call(turn, step, count)]))
                    count += 1
                elif isinstance(step, End):
                    yield _line(head.line("", done=True, **_figures(step)))
    except ApiError as error:
        yield _line({"error": error.message})
    except Exception:  # noqa: BLE001  whatever it is, the client gets an end and the log the reason
        turn.log_failure()
        yield _line({"error": internal().message})
    finally:
        turn.close()


async def _whole(head: Head, turn: Turn) -> dict[str, Any]:
    async with aclosing(turn.steps()) as coming:
        steps: list[Step] = [step async for step in coming]
    if not steps or not isinstance(end := steps[-1], End):
        raise internal()
    texts = [one for one in steps if isinstance(one, Text)]
    calls = [one for one in steps if isinstance(one, Call)]
    more: dict[str, Any] = {}
    if thoughts := "".join(one.text for one in texts if one.kind != ANSWER):
        more["thinking"] = thoughts
    if calls:
        more["tool_calls"] = [_call(turn, one, index) for index, one in enumerate(calls)]
    answer = "".join(one.text for one in texts if one.kind == ANSWER)
    return head.line(answer, done=True, **more, **_figures(end))


def _call(turn: Turn, call: Call, index: int) -> dict[str, Any]:
    function = {"index": index, "name": call.name, "arguments": turn.arguments(call)}
    return {"id": turn.remember(call), "function": function}


def _figures(end: End) -> dict[str, Any]:
    """Times in ns."""
    prefill, decode = round(1e9 * end.prefill_s), round(1e9 * end.decode_s)
    return {
        "done_reason": "length" if end.reason == "length" else "stop",
        "total_duration": prefill + decode,
        "load_duration": 0,
        "prompt_eval_count": end.num_prompt_tokens,
        "prompt_eval_duration": prefill,
        "eval_count": end.num_generated_tokens,
        "eval_duration": decode,
    }


# ---- what clients look at ----------------------------------------------------------------------------------


async def tags(request: Request) -> Response:
    """GET /api/tags and /api/ps: the model under all its names."""
    return json_response({"models": _models(service_of(request))})


def _models(service: Service) -> Sequence[dict[str, Any]]:
    return [
        {
            "name": name,
            "model": name,
            "modified_at": Head(name).created,
            "size": 0,
            "digest": "",
            "details": _details(),
            "context_length": service.core.context,
        }
        for name in service.settings.aliases
    ]


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "krasis",
        "family": "krasis",
        "families": ["krasis"],
        "parameter_size": "",
        "quantization_level": "",
    }


async def show(request: Request) -> Response:
    """POST /api/show: clients look for the context and for what the model can do."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    service.model_name(fields.any("model") or fields.any("name"))
    thinks = service.prompts.assets.template is not None and bool(service.prompts.assets.thinking)
    return json_response(
        {
            "modelfile": "",
            "parameters": "",
            "template": service.prompts.source,
            "details": _details(),
            "model_info": {
                "general.architecture": "krasis",
                "krasis.context_length": service.core.context,
                "krasis.vocab_size": service.core.vocab_size,
            },
            "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
        }
    )


async def version(_: Request) -> Response:
    """GET /api/version."""
    return json_response({"version": tool_version()})
