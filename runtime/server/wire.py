"""Bytes of the wire: bodies of requests, JSON and server-sent events."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from krasis.formats.errors import FormatError
from krasis.formats.strict_json import parse_json
from krasis.runtime.server.errors import ApiError, refused

EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
DONE = b"data: [DONE]\n\n"
_ESCAPES = re.compile(
    rb"(?P<other>\\[^u])|(?P<pair>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def to_json(value: Any) -> bytes:
    """JSON's bytes, without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "replace"
    )


def data_event(value: Any) -> bytes:
    """An event without a name, as OpenAI's chat has them."""
    return b"data: " + to_json(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """An event named by its ``type``, as Anthropic's messages and OpenAI's responses have them."""
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + to_json(value) + b"\n\n"


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in one piece."""
    return Response(to_json(value), status, headers, "application/json")


async def read_object(request: Request, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """A request's JSON object.

    Raises ApiError: 413 beyond max_bytes (before more is read), 408 for a sender that is too slow, 400 for
    what is no JSON object.
    """
    data = await read_body(request, max_bytes, timeout_s)
    if _HALF.search(data):
        # Programs cut texts in the middle of an emoji; the conversation must be able to go on.
        data = _ESCAPES.sub(_whole, data)
    try:
        value = parse_json(data, "the request's body", max_bytes=max_bytes, wide_text=True)
    except FormatError as error:
        raise refused(f"The request's body is not usable JSON: {error.what} (got {error.got}).") from error
    if not isinstance(value, dict):
        raise refused("The request's body must be a JSON object.")
    return value


def _whole(found: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if found["half"] is not None else found.group()


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """A request's body. Raises as ``read_object``."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                size += len(piece)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                pieces.append(piece)
    except TimeoutError as error:
        raise ApiError(408, f"The request's body did not arrive within {timeout_s:g} seconds.") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was complete.") from error
    return b"".join(pieces)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The request's body is larger than {max_bytes} bytes.", "request_too_large")
