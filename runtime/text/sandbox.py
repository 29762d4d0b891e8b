"""The owner of the worker that runs chat templates and tokenizers (``worker``): one a process, started
in the background, and started anew when a file has brought it down.

Why both only ever run there: a trial before loading here would not do, for a tokenizer can be harmless on any
probe and explode on the text it waits for, and it would be loaded twice. In the worker, Jinja and the
tokenizers library are imported beside NumPy, not after it. A request costs some 0.1 ms; decoding, once a
token, costs none where the tokens are spelled byte by byte (``byte_level``).
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import weakref
from collections.abc import Mapping
from threading import RLock
from typing import Any

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.process.worker_process import WorkerLost, WorkerProcess, WorkerRefusal
from krasis.formats.process.worker_protocol import pack_parts

logger = logging.getLogger(__name__)

MIB = 1 << 20
# What any request may spend, in seconds of CPU and bytes, and what more for every byte it gives. A tokenizer
# of 150,000 tokens (12 MB) takes 0.6 s and 120 MiB to load; text at its worst, a token each byte, 1.6 s and
# 270 MB a megabyte to encode.
_SECONDS, _MEMORY_BYTES = 0.5, 224 * MIB
_SECONDS_PER_BYTE = {"load_tokenizer": 0.2 / MIB, "encode": 3.0 / MIB}
_MEMORY_PER_BYTE = {"load_tokenizer": 16, "encode": 300}
_OTHER_SECONDS_PER_BYTE, _OTHER_MEMORY_PER_BYTE = 1.0 / MIB, 32
_MODULE = "krasis.runtime.text.worker"
_numbers = itertools.count(1)


class Resident:
    """A template or tokenizer that the worker holds. operation, payload: load it, again if need be. where:
    the file. failure: the sentence for one that cannot be loaded.
    """

    __slots__ = ("__weakref__", "failure", "number", "operation", "options", "payload", "where")

    def __init__(
        self, operation: str, payload: bytes, where: str, failure: str, options: dict[str, Any] | None = None
    ) -> None:
        self.operation, self.payload, self.where, self.failure = operation, payload, where, failure
        self.options = options or {}
        self.number = next(_numbers)


class TextSandbox:
    """Serves any number of residents, one call at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._process: WorkerProcess | None = None
        self._loaded: set[int] = set()
        self._dropped: list[int] = []

    def start(self) -> None:
        """Starts the worker in the background if there is none. What fails is told when it is needed."""
        with self._lock:
            if self._process is None:
                try:
                    self._process = WorkerProcess(_MODULE)
                except ResourceError as error:
                    logger.info("no worker yet: %s", error)

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def load(self, resident: Resident) -> bytes:
        """Loads it; gives what the worker says of it. Raises FormatError, ResourceError."""
        with self._lock:
            answer = self._request(
                resident, resident.failure, {"options": resident.options}, resident.payload, 64 * MIB
            )
            self._loaded.add(resident.number)
            weakref.finalize(resident, self._dropped.append, resident.number).atexit = False
            return answer

    def call(
        self,
        resident: Resident,
        operation: str,
        failure: str,
        head: Mapping[str, Any],
        text: bytes,
        max_answer_bytes: int,
    ) -> bytes:
        """An operation with a resident. failure: the sentence if it fails.

        Raises FormatError, and ResourceError if the system starts no worker.
        """
        with self._lock:
            self._revive()
            if resident.number not in self._loaded:
                logger.info("%s: loaded again in a new worker", resident.where)
                self._request(
                    resident, resident.failure, {"options": resident.options}, resident.payload, 64 * MIB
                )
                self._loaded.add(resident.number)
            return self._request(resident, failure, head, text, max_answer_bytes, operation)

    def close(self) -> None:
        """Ends the worker; the next call starts another."""
        with self._lock:
            if self._process is not None:
                self._process.close()
            self._process = None
            self._loaded.clear()

    def end(self) -> None:
        """When this process ends: no child is left for others to collect."""
        if self._process is not None:
            self._process.end()

    def forget(self) -> None:
        """Lets go of the worker in the child of a fork: it is the parent's."""
        self._lock = RLock()
        if self._process is not None:
            self._process.forget()
        self._process = None
        self._loaded.clear()

    def _revive(self) -> WorkerProcess:
        if self._process is not None and not self._process.is_alive:
            self.close()
        if self._process is None:
            self._process = WorkerProcess(_MODULE)
        return self._process

    def _request(
        self,
        resident: Resident,
        failure: str,
        head: Mapping[str, Any],
        text: bytes,
        max_answer_bytes: int,
        operation: str = "",
    ) -> bytes:
        process = self._revive()
        while self._dropped:
            number = self._dropped.pop()
            if number in self._loaded:
                self._loaded.remove(number)
                self._send(process, resident, failure, "drop", pack_parts({"number": number}), 0)
        payload = pack_parts({**head, "number": resident.number}, text)
        return self._send(
            process, resident, failure, operation or resident.operation, payload, max_answer_bytes
        )

    def _send(
        self,
        process: WorkerProcess,
        resident: Resident,
        failure: str,
        operation: str,
        payload: bytes,
        max_answer_bytes: int,
    ) -> bytes:
        try:
            return process.call(
                operation,
                payload,
                cpu_s=_SECONDS + len(payload) * _SECONDS_PER_BYTE.get(operation, _OTHER_SECONDS_PER_BYTE),
                memory_bytes=_MEMORY_BYTES
                + len(payload) * _MEMORY_PER_BYTE.get(operation, _OTHER_MEMORY_PER_BYTE),
                max_answer_bytes=max_answer_bytes,
            )
        except WorkerRefusal as error:
            raise FormatError(failure, where=resident.where, got=error) from error
        except WorkerLost as error:
            self.close()
            raise FormatError(
                failure, where=resident.where, got=error, hint="the file may be damaged or hostile"
            ) from error
        except BaseException:
            self.close()  # its answer would be taken for the next one's
            raise


_shared = TextSandbox()
atexit.register(_shared.end)
os.register_at_fork(after_in_child=_shared.forget)


def shared_sandbox() -> TextSandbox:
    """This process's."""
    return _shared
