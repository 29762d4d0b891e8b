"""Connections that take too long to say what they want are closed."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """uvicorn's, with a limit of time for a request's headers. Bodies have their own (``wire.read_body``)."""

    header_timeout_s = 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        super().data_received(data)
        if self._is_between():
            self._arm()
        else:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._disarm()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Never: HTTP/1.1 is what is spoken here, and it answers clients that offer more, as Java's do with
        each request. uvicorn's would log two warnings about them."""
        return False

    def _is_between(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout_s, self._close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if self._is_between() and not self.transport.is_closing():
            self.transport.close()


def patient_protocol(header_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol with a limit of its own, in seconds."""
    made = type("PatientProtocol", (PatientProtocol,), {"header_timeout_s": header_timeout_s})
    return cast("type[asyncio.Protocol]", made)
