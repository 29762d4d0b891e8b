"""A backend on several ranks that looks like one: rank 0 commands, the others follow (``serve``).

Prefill is done by all in step. Decode is rank 0's alone, so its keys and values are missing elsewhere; they
are sent before the next joint prefill, and so is whatever else rank 0 wrote alone (a prefix read from a file,
a short prompt).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import numpy as np

from krasis.runtime.backend import KvRows, LayerProgress, Logits, TokenIds
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.one_sequence import OneSequence

logger = logging.getLogger(__name__)


class DistributedBackend(OneSequence):
    """Rank 0's side of a job: see ``model.backend.Backend``. close: frees inner and all else, after the other
    ranks were told to leave."""

    def __init__(
        self, inner: RankedBackend, parallel: Parallel, control: Control, close: Callable[[], None]
    ) -> None:
        self._inner, self._parallel, self._control = inner, parallel, control
        self._close: Callable[[], None] | None = close
        self.capacity, self.prefill_chunk = inner.capacity, inner.prefill_chunk
        self.description = f"{parallel.num_ranks} ranks; rank 0: {inner.description}"
        self.kv_dtype, self.spec = inner.kv_dtype, inner.spec
        self._num_shared = 0  # positions whose keys and values all ranks have
        self._layer_done: LayerProgress | None = None
        self._raised: BaseException | None = None  # by layer_done, in a joint pass

    @property
    def layer_done(self) -> LayerProgress | None:
        """Told of rank 0's layers, which are the others' too. What it raises in a pass of all ranks is raised
        when they have ended it: a rank that left half-way would leave the others waiting.
        """
        return self._layer_done

    @layer_done.setter
    def layer_done(self, callback: LayerProgress | None) -> None:
        self._layer_done = self._inner.layer_done = callback

    def _tell(self, done: int, num_layers: int) -> None:
        if self._layer_done is None or self._raised is not None:
            return
        try:
            self._layer_done(done, num_layers)
        except BaseException as error:  # noqa: BLE001  raised by ``prefill``
            self._raised = error

    @property
    def placement(self) -> tuple[str, str]:
        """Where prefill and decode run, in a few words."""
        prefill, decode = self._inner.placement
        return f"{self._parallel.num_ranks} ranks: {prefill}", f"rank 0: {decode}"

    @property
    def last_prefill(self) -> object:
        """What rank 0 did in the last prefill, if its backend says; for benchmarks."""
        return getattr(self._inner, "last_prefill", None)

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """See ``model.backend.Backend``. Raises RankError if a rank fails; nothing works any more after
        it."""
        if self._inner.prefers_alone(len(tokens), start):
            self._num_shared = min(self._num_shared, start)
            return self._inner.prefill(tokens, start, want_all, alone=True)
        shared = min(self._num_shared, start)
        self._raised = None
        self._inner.layer_done = None if self._layer_done is None else self._tell
        try:
            with _interrupts_deferred():
                self._control.send(
                    "prefill", tokens=tokens.tolist(), start=start, want_all=want_all, shared=shared
                )
                with self._control.joint("prefill"):
                    logits = prefill_in_step(self._inner, self._parallel, tokens, start, want_all, shared)
        finally:
            self._inner.layer_done = self._layer_done
        self._num_shared = start + len(tokens)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        return logits

    def decode(self, token: int, position: int) -> Logits:
        """See ``model.backend.Backend``."""
        if not self._inner.decodes_alone:
            logits: Logits = self.prefill(np.array([token], dtype=np.int64), position, False)[-1]
            return logits
        self._num_shared = min(self._num_shared, position)
        return self._inner.decode(token, position)

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """See ``model.backend.Backend``."""
        return self._inner.export_kv(layer, num_tokens)

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """See ``model.backend.Backend``."""
        self._num_shared = 0
        self._inner.import_kv(layer, keys, values)

    def close(self) -> None:
        """See ``model.backend.Backend``."""
        if self._close is None:
            return
        close, self._close = self._close, None
        try:
            if self._control.failure is None:
                self._control.send("close")
        finally:
            close()


def serve(backend: RankedBackend, parallel: Parallel, control: Control) -> None:
    """What every other rank does: follows rank 0 until it closes. Raises RankError if the job fails."""
    while True:
        command = control.receive()
        name = command.pop("name")
        logger.debug("rank %d: %s", parallel.rank, name)
        if name == "close":
            return
        tokens = np.asarray(command.pop("tokens"), dtype=np.int64)
        with control.joint(name):
            prefill_in_step(backend, parallel, tokens, **command)


def prefill_in_step(
    backend: RankedBackend, parallel: Parallel, tokens: TokenIds, start: int, want_all: bool, shared: int
) -> Logits:
    """One rank's part of a joint prefill. shared: positions that all ranks' caches hold; rank 0 sends the
    rest."""
    stream = backend.compute_stream
    if shared < start:
        for keys, values in backend.kv_layers():
            parallel.send_kv(stream, keys, values, shared, start)
    logits = backend.prefill(tokens, start, want_all)
    stream.synchronize()
    return logits


@contextmanager
def _interrupts_deferred() -> Generator[None]:
    """Ctrl-C inside waits for the end: a rank that left a pass half-way would leave the others waiting. A
    second one does not wait, and so ends the job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
