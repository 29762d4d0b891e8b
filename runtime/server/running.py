"""Runs the server: answers 503 while the model is loading, ends in order at a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from krasis.formats.errors import ResourceError
from krasis.runtime.server.app import make_app
from krasis.runtime.server.auth import error_response_body
from krasis.runtime.server.errors import ApiError
from krasis.runtime.server.page_files import PageFiles
from krasis.runtime.server.patience import patient_protocol
from krasis.runtime.server.service import Service
from krasis.runtime.server.wire import json_response
from krasis.runtime.serving.api import CoreClosedError

logger = logging.getLogger(__name__)

BACKLOG = 1024
GRACE_S = 5  # in which streams that were told the end may be read to it
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def listen_all(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """A socket for each address, all on one port. Raises ResourceError."""
    found: list[socket.socket] = []
    try:
        for host in hosts:
            found.append(listen(host, port))
            port = found[0].getsockname()[1]
    except BaseException:
        for one in found:
            one.close()
        raise
    return found


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ResourceError if the address cannot be used."""
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ResourceError(
            "this address cannot be listened on",
            where=where,
            got=error.strerror or error,
            hint="choose another --port",
        ) from error
    return listener


class Door:
    """The application: 503 until the model is there. page: people may look at it meanwhile."""

    def __init__(self, page: PageFiles | None = None) -> None:
        self.app: ASGIApp | None = None
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif self._page is not None and self._page.is_asked(scope):
            await self._page(scope, receive, send)
        elif scope["type"] == "http":
            error = ApiError(503, "The model is loading.", "loading", retry_after_s=5)
            body = error_response_body(scope["path"], error)
            await json_response(body, 503, error.headers)(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn's, whose end begins with that of the streams, and whose signals end it and nothing else."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_end = on_end
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: ``_signals_end`` does it, for longer than uvicorn would."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: streams end with an error, then the server."""
        del frame
        if not self.should_exit:
            logger.info("%s: ending", signal.Signals(sig).name)
        self.end()

    def end(self) -> None:
        """Ends it, from any thread."""
        self.should_exit = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_end)


@contextmanager
def _signals_end(server: _Server) -> Iterator[None]:
    """Inside, a signal ends the server. A second one does not keep prefixes from being saved."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _config(door: Door, header_timeout_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        door,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        loop="asyncio",
        ws="none",  # nothing here speaks it, whatever is installed beside
        http=patient_protocol(header_timeout_s),
    )


def run(
    listeners: Sequence[socket.socket],
    load: Callable[[], Service],
    unload: Callable[[], None],
    on_ready: Callable[[Service], None] = lambda _: None,
    page: PageFiles | None = None,
    wait: Callable[[], BaseException | None] | None = None,
    *,
    header_timeout_s: float = 60.0,
) -> None:
    """Serves until a signal comes. load: makes the service, in a thread, while requests are told to wait.
    unload: saves and frees it, at the very end; a second call does nothing. If the end comes before it is
    loaded, unload may make load raise CoreClosedError. page: what browsers may have while it is loading.
    header_timeout_s: for the headers of a request to arrive.
    wait: returns when the service works no more, and says what ended it: then the server ends too.

    Raises what load raises, and what wait says.
    """
    door = Door(page)
    service: list[Service] = []
    failure: list[BaseException] = []

    def close() -> None:
        for one in service:
            one.close()

    server = _Server(_config(door, header_timeout_s), close)

    def watching(wait: Callable[[], BaseException | None]) -> None:
        if (error := wait()) is not None:
            failure.append(error)
        server.end()

    def loading() -> None:
        try:
            service.append(load())
            door.app = make_app(service[0])
            if not server.should_exit:
                on_ready(service[0])
            if wait is not None:
                Thread(target=watching, args=(wait,), name="watch", daemon=True).start()
        except BaseException as error:  # noqa: BLE001  it is raised again in the main thread
            if not (server.should_exit and isinstance(error, CoreClosedError)):
                failure.append(error)
            server.end()

    loader = Thread(target=loading, name="load", daemon=True)
    loader.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a token must not wait for JSON
    with _signals_end(server):
        try:
            server.run(sockets=list(listeners))
        finally:
            sys.setswitchinterval(interval)
            if loader.is_alive():
                unload()  # whoever wants the end does not wait for a model
            loader.join()
            unload()
    if failure:
        raise failure[0]
