"""The smaller endpoints: models, health, properties, slots, tokens, templates, figures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.errors import KrasisError
from krasis.formats.process.tool import tool_version
from krasis.runtime.server.ask import read_effort
from krasis.runtime.server.continuing import read_goes_on
from krasis.runtime.server.errors import ApiError, from_krasis, refused, shutting_down
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.llama_metrics import llama_metrics
from krasis.runtime.server.native_settings import sampling_settings
from krasis.runtime.server.service import Service, service_of
from krasis.runtime.server.tools.choice import read_tools
from krasis.runtime.server.turn import of_core
from krasis.runtime.server.wire import json_response
from krasis.runtime.text.messages import token_ids
from krasis.runtime.text.token_ids import checked_ids

STARTED = int(time.time())


async def models(request: Request) -> Response:
    """GET /v1/models: the model under all its names, with its context under all the names clients look
    for."""
    service = service_of(request)
    return json_response(
        {"object": "list", "data": [_model(service, name) for name in service.settings.aliases]}
    )


async def one_model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    service = service_of(request)
    name = request.path_params["name"]
    if name not in service.settings.aliases:
        raise ApiError(404, f"The model {name[:100]!r} does not exist.", "model_not_found", "model")
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    context = service.core.context
    longest = service.settings.max_context or context
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "krasis",
        "root": service.settings.bundle or name,
        "parent": None,
        "max_model_len": context,
        "context_length": context,
        "meta": {"n_ctx": context, "n_ctx_train": longest, "n_vocab": service.core.vocab_size},
    }


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are taken."""
    service = service_of(request)
    if service.closing.is_set():
        raise shutting_down()
    if (trouble := service.core.trouble()) is not None:
        raise of_core(trouble)
    return json_response({"status": "ok"})


async def root(_: Request) -> Response:
    """GET and HEAD /: clients look whether anybody is there."""
    return Response("krasis-serve is running. The API is under /v1.\n", 200, media_type="text/plain")


async def properties(request: Request) -> Response:
    """GET /props: what llama.cpp's page and clients look for."""
    service = service_of(request)
    context = service.core.context
    params = {**sampling_settings(service.sampling), "n_predict": -1, "stream": True}
    return json_response(
        {
            "default_generation_settings": {"id": 0, "n_ctx": context, "params": params},
            "total_slots": len((await service.status()).slots),
            "model_alias": service.settings.aliases[0],
            "model_path": service.settings.bundle,
            "n_ctx": context,
            "chat_template": service.prompts.source,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"krasis {tool_version()}",
            "description": service.core.description,
        }
    )


async def slots(request: Request) -> Response:
    """GET /slots: who uses what."""
    service = service_of(request)
    if not service.settings.slots:
        raise ApiError(501, "The server was started with --no-slots.")
    status = await service.status()
    return json_response(
        [
            {
                "id": one.slot,
                "n_ctx": service.core.context,
                "n_tokens": one.num_tokens,
                "is_processing": bool(one.request),
                "request": one.request,
            }
            for one in status.slots
        ]
    )


async def metrics(request: Request) -> Response:
    """GET /metrics, in Prometheus' text format."""
    service = service_of(request)
    if not service.settings.metrics:
        raise ApiError(501, "The server was started with --no-metrics.")
    data, kind = await asyncio.to_thread(service.metrics.text)
    data += llama_metrics(await service.status()).encode()
    return Response(data, 200, {"Content-Type": kind, "Process-Start-Time-Unix": str(STARTED)})


async def tokenize(request: Request) -> Response:
    """POST /tokenize: llama.cpp's form (content), and vLLM's (prompt or messages)."""
    service = service_of(request)
    fields = Fields(await service.read(request))

    def ids() -> list[int]:
        if fields.has("messages"):
            return service.prompts.tokens(_rendered(service, fields))
        text = fields.text("content", fields.text("prompt"))
        if text is None:
            raise refused("'content' is missing.", "content")
        return service.prompts.tokens(text, special=fields.flag("add_special"))

    found = await service.in_thread(ids)
    if fields.flag("with_pieces"):
        pieces: list[Any] = [{"id": one, "piece": service.token_text(one)} for one in found]
        return json_response({"tokens": pieces})
    return json_response({"tokens": found, "count": len(found), "max_model_len": service.core.context})


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    ids = token_ids(fields.any("tokens"))
    if ids is None:
        raise refused("'tokens' must be a list of token ids.", "tokens", "invalid_type")
    try:
        known = [int(one) for one in checked_ids(ids, service.core.vocab_size)]
        text = await service.in_thread(service.prompts.assets.tokenizer.decode, known)
    except KrasisError as error:
        raise from_krasis(error, "tokens") from error
    return json_response({"content": text, "prompt": text})


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the prompt's text of a conversation."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    return json_response({"prompt": await service.in_thread(_rendered, service, fields)})


async def chat_input_tokens(request: Request) -> Response:
    """POST /v1/chat/completions/input_tokens."""
    service = service_of(request)
    fields = Fields(await service.read(request))
    text = await service.in_thread(_rendered, service, fields)
    return json_response(
        {"object": "response.input_tokens", "input_tokens": len(service.prompts.tokens(text))}
    )


def _rendered(service: Service, fields: Fields) -> str:
    return service.prompts.text(
        fields.any("messages"),
        read_tools(fields).tools,
        think=read_effort(fields),
        variables=fields.mapping("chat_template_kwargs"),
        add_generation_prompt=fields.flag("add_generation_prompt", True),
        goes_on=read_goes_on(fields, fields.any("messages")),
    )


async def not_offered(request: Request) -> Response:
    """501: other models' work."""
    raise ApiError(501, f"{request.url.path} is not supported: this model writes text.")
