"""Streams that never fall silent, and work that ends when its client has left.

The timer is of the wall clock and of this part of the program: however long the engine is busy with a prompt,
something that the API's clients take for life goes out every few seconds. Clients cut a silent stream after
300 seconds and send the whole prompt again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from krasis.runtime.server.wire import EVENT_HEADERS

T = TypeVar("T")


async def with_keepalive(
    frames: AsyncIterator[bytes], interval_s: float, no_op: Callable[[], bytes]
) -> AsyncIterator[bytes]:
    """The frames, and what no_op gives whenever none came for interval_s."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(_next(frames))
            done, _ = await asyncio.wait({pending}, timeout=interval_s)
            if not done:
                yield no_op()
                continue
            try:
                frame = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield frame
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await pending
        close = getattr(frames, "aclose", None)
        if close is not None:
            await close()


async def _next(frames: AsyncIterator[bytes]) -> bytes:
    return await frames.__anext__()


class EventStream(Response):
    """Server-sent events. Its frames' generator is closed as soon as the client has left.

    on_end: called when all is over, also if nothing was ever sent.
    """

    def __init__(self, frames: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(None, 200, EVENT_HEADERS)
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self._frames, self._on_end = frames, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the frames as they come."""
        start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await until_disconnected(receive, self._send(start, send))
        finally:
            self._on_end()

    async def _send(self, start: Message, send: Send) -> None:
        try:
            await send(start)
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close = getattr(self._frames, "aclose", None)
            if close is not None:
                await close()


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What work gives; None if the client left first: then work is cancelled."""
    worker = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, listener}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        return None
    finally:
        for task in (worker, listener):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
