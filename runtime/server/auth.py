"""Who may ask: API keys, and which web pages' scripts."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from krasis.runtime.server.errors import ApiError
from krasis.runtime.server.wire import json_response

PUBLIC = frozenset(["/", "/health", "/v1/health", "/models"])
_LOOPBACK = frozenset(["localhost", "127.0.0.1", "::1"])
_ALLOWED = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Max-Age": "600",
}


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API, whose errors look different."""
    return path.startswith("/v1/messages")


def error_response_body(path: str, error: ApiError) -> dict[str, object]:
    """An error in the form of the path's API."""
    if path.startswith("/api/"):  # ollama's
        return {"error": error.message}
    return error.anthropic() if is_anthropic(path) else error.openai()


class Gate:
    """Middleware: refuses wrong keys with 401 and other origins' scripts with 403, answers preflights, and
    gives every answer the request's id.

    keys: none: everybody may ask. origins: further ones than loopback's and this server's own; ``*`` is any.
    is_file: says of a path whether it is a file of the page, for which nobody needs a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        is_file: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._app, self._is_file = app, is_file
        self._keys = [key.encode() for key in keys]
        self._origins = frozenset(one.rstrip("/").lower() for one in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path, origin = scope["path"], headers.get("origin")
        extra: dict[str, str] = {}
        request_id = headers.get("x-request-id", "")[:200]
        if request_id and request_id.isprintable() and request_id.isascii():
            extra["x-request-id"] = request_id
        if origin is not None:
            may_ask = self._may_ask(origin, headers.get("host", ""))
            if not may_ask and scope["method"] == "OPTIONS":
                await json_response({})(scope, receive, send)  # without what would let its scripts ask
                return
            if not may_ask:
                await self._refuse(
                    ApiError(403, f"Scripts of {origin[:200]!r} may not ask this server."),
                    scope,
                    receive,
                    send,
                )
                return
            extra |= {
                "Access-Control-Allow-Origin": origin,
                "Vary": "Origin",
                "Access-Control-Expose-Headers": "*",
            }
            if scope["method"] == "OPTIONS":
                wanted = headers.get("access-control-request-headers", "*")
                extra |= {
                    **_ALLOWED,
                    "Access-Control-Allow-Headers": wanted,
                    "Access-Control-Allow-Credentials": "true",
                }
                await json_response({}, 200, extra)(scope, receive, send)
                return
        if self._keys and scope["method"] != "OPTIONS" and not self._is_public(path, headers):
            error = ApiError(
                401, "Invalid API key. Give it as a Bearer token or as x-api-key.", "invalid_api_key"
            )
            await self._refuse(error, scope, receive, _with_headers(send, extra))
            return
        await self._app(scope, receive, _with_headers(send, extra))

    def _is_public(self, path: str, headers: Headers) -> bool:
        return path in PUBLIC or self._has_key(headers) or self._is_file(path)

    def _may_ask(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin.rstrip("/").lower() in self._origins:
            return True
        try:
            found = urlsplit(origin)
            name = found.hostname or ""
        except ValueError:
            return False
        if name in _LOOPBACK:
            return True
        # The server's own page, under the address by which its user reached it. Whoever owns a name can make
        # it point to this machine and call itself the same origin, so a name alone says nothing: it must be
        # this machine's, or there must be a key, which a stranger's page does not have.
        if not name or found.netloc.lower() != host.lower():
            return False
        return bool(self._keys) or _is_here(name)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "")] + ([token.strip()] if scheme.lower() == "bearer" else [])
        found = False
        for one in given:
            for key in self._keys:  # all of them, so that the time says nothing
                found |= hmac.compare_digest(one.encode("utf-8", "replace"), key)
        return found

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        body = error_response_body(scope["path"], error)
        await json_response(body, error.status, error.headers)(scope, receive, send)


def _is_here(name: str) -> bool:
    """Whether it is an address, or this machine's own name."""
    own = socket.gethostname().lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in (own, own.partition(".")[0], own.partition(".")[0] + ".local")
    return True


def _with_headers(send: Send, extra: dict[str, str]) -> Send:
    if not extra:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in extra.items():
                headers[name] = value
        await send(message)

    return sending
