"""The web application: routes, and errors in each API's form."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from krasis.runtime.server import ollama, utility
from krasis.runtime.server.auth import Gate, error_response_body
from krasis.runtime.server.chat import chat_completions
from krasis.runtime.server.completions import completions
from krasis.runtime.server.errors import ApiError, internal
from krasis.runtime.server.messages import count_tokens, messages
from krasis.runtime.server.native import native_completion
from krasis.runtime.server.openapi import openapi
from krasis.runtime.server.page_files import PageFiles, wants_page
from krasis.runtime.server.responses import input_tokens, responses
from krasis.runtime.server.service import ClientLeft, Service
from krasis.runtime.server.slot_endpoint import act_on_slot
from krasis.runtime.server.wire import json_response

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

_POST = {
    "chat/completions": chat_completions,
    "chat/completions/input_tokens": utility.chat_input_tokens,
    "completions": completions,
    "messages": messages,
    "messages/count_tokens": count_tokens,
    "responses": responses,
    "responses/input_tokens": input_tokens,
    "tokenize": utility.tokenize,
    "detokenize": utility.detokenize,
    "apply-template": utility.apply_template,
}
_GET = {"models": utility.models, "health": utility.health}
_ALONE = {"props": utility.properties, "slots": utility.slots, "metrics": utility.metrics}
_ALONE["openapi.json"] = openapi
_OLLAMA = {"chat": ollama.chat, "show": ollama.show, "generate": utility.not_offered}
_OLLAMA_GET = {"tags": ollama.tags, "ps": ollama.tags, "version": ollama.version}
_NOT_OFFERED = (
    "embeddings",
    "rerank",
    "audio/speech",
    "audio/transcriptions",
    "images/generations",
    "moderations",
)


def make_app(service: Service) -> ASGIApp:
    """The application of one service."""
    settings = service.settings
    page = None if settings.ui is None else PageFiles(settings.ui)
    routes = [_route("/", utility.root if page is None else _root(page), "GET")]
    routes += [_route(path, native_completion, "POST") for path in ("/completion", "/completions")]
    for prefix in ("/v1/", "/"):
        routes += [_route(prefix + path, endpoint, "POST") for path, endpoint in _POST.items()]
        routes += [_route(prefix + path, endpoint, "GET") for path, endpoint in _GET.items()]
        routes += [_route(prefix + path, utility.not_offered, "POST") for path in _NOT_OFFERED]
    routes += [_route("/" + path, endpoint, "GET") for path, endpoint in _ALONE.items()]
    routes += [_route("/api/" + path, endpoint, "POST") for path, endpoint in _OLLAMA.items()]
    routes += [_route("/api/" + path, endpoint, "GET") for path, endpoint in _OLLAMA_GET.items()]
    routes.append(_route("/slots/{number}", act_on_slot, "POST"))
    routes.append(_route("/v1/models/{name:path}", utility.one_model, "GET"))
    app = Starlette(routes=routes, exception_handlers={HTTPException: _on_http_error})
    app.state.service = service
    if page is None:
        return Gate(app, settings.api_keys, settings.cors_origins)
    app.router.default = page  # for paths of no route

    def is_file(path: str) -> bool:
        return page.find(path) is not None and not any(one.path_regex.match(path) for one in routes)

    return Gate(app, settings.api_keys, settings.cors_origins, is_file)


def _root(page: PageFiles) -> Endpoint:
    async def root(request: Request) -> Response:
        if wants_page(request.scope):
            return await page.response(request.scope)
        answer = await utility.root(request)
        answer.headers["Vary"] = "Accept"
        return answer

    return root


def _route(path: str, endpoint: Endpoint, method: str) -> Route:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            # That the engine is lost was said once; who comes meanwhile, such as health checks, comes often.
            level = logging.DEBUG if error.code == "engine_lost" else logging.INFO
            logger.log(level, "%s %s: %d, %s", request.method, request.url.path, error.status, error.message)
            return _answer(request, error)
        except ClientLeft:
            return Response(status_code=499)
        except Exception:
            logger.exception("%s %s failed", request.method, request.url.path)
            return _answer(request, internal())

    return Route(path, guarded, methods=[method])


def _answer(request: Request, error: ApiError) -> Response:
    return json_response(error_response_body(request.url.path, error), error.status, error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "There is no such path.", 405: "This path does not know that method."}
    answer = _answer(request, ApiError(status, words.get(status, "The request cannot be served.")))
    answer.headers.update(dict(getattr(error, "headers", None) or {}))
    return answer
