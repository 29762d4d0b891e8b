"""POST /slots/N?action=save, restore or erase, as llama.cpp has them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.errors import KrasisError
from krasis.runtime.server.errors import ApiError, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.service import service_of
from krasis.runtime.server.turn import of_core
from krasis.runtime.server.wire import json_response
from krasis.runtime.serving.api import Slots

_ACTIONS = ("save", "restore", "erase")


async def act_on_slot(request: Request) -> Response:
    """The endpoint. A slot in which somebody works is refused."""
    service = service_of(request)
    # --no-slots hides what slots hold; who names a folder for them means to act on them all the same.
    if service.slots is None or not (service.settings.slots or service.slots.folder):
        raise ApiError(501, "This server's slots cannot be acted on.")
    action = request.query_params.get("action", "")
    if action not in _ACTIONS:
        raise refused(f"'action' must be one of {', '.join(_ACTIONS)}.", "action")
    number = request.path_params["number"]
    if not number.isdecimal() or not number.isascii() or len(number) > 9:
        raise refused("A slot is named by its number.", "id_slot")
    body = await service.read(request) if action != "erase" else {}
    try:
        found = await _done(service.slots, action, int(number), Fields(body))
    except KrasisError as error:
        raise of_core(error) from error
    return json_response({"id_slot": int(number), **found})


async def _done(slots: Slots, action: str, number: int, fields: Fields) -> dict[str, Any]:
    begin = time.perf_counter()
    if action == "erase":
        return {"n_erased": await asyncio.wrap_future(slots.erase(number))}
    name = fields.text("filename")
    if name is None:
        raise refused("'filename' is missing.", "filename")
    if action == "save":
        saved = await asyncio.wrap_future(slots.save(number, name))
        took = {"save_ms": 1e3 * (time.perf_counter() - begin)}
        return {"filename": name, "n_saved": saved.num_tokens, "n_written": saved.num_bytes, "timings": took}
    restored = await asyncio.wrap_future(slots.restore(number, name))
    took = {"restore_ms": 1e3 * (time.perf_counter() - begin)}
    return {
        "filename": name,
        "n_restored": restored.num_tokens,
        "n_read": restored.num_bytes,
        "timings": took,
    }
