"""A backend on several ranks that looks like one: rank 0 commands, the others follow (``serve``).

Prefill is done by all in step, whatever sequences a batch has. Tokens are decoded by rank 0, for which the
others on its host compute the experts they hold (``joint_decode``): their keys and values are missing
elsewhere, and are sent before the next joint prefill of that sequence, and so is whatever
else rank 0 wrote alone (a prefix read from a file or another slot, a short prompt). Which slots are open and
how long they are only rank 0 needs to know: a command says where each of its sequences begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from krasis.formats.errors import NativeError, OutOfDeviceMemoryError
from krasis.runtime.backend import LayerProgress, Logits
from krasis.runtime.batch import Batch, Span
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.interrupts import interrupts_deferred
from krasis.runtime.distributed.joint_decode import JointDecode, follow_decode
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.distributed.state import FirstRanksState
from krasis.runtime.gpu.chunk import part_of
from krasis.runtime.gpu.parallel import KvPart, Parallel
from krasis.runtime.loading import Loads, is_loading

logger = logging.getLogger(__name__)


class DistributedBackend:
    """Rank 0's side of a job: see ``runtime.backend.Backend``. close: frees inner and all else, after the
    other ranks were told to leave."""

    def __init__(
        self, inner: RankedBackend, parallel: Parallel, control: Control, close: Callable[[], None]
    ) -> None:
        self._inner, self._parallel, self._control = inner, parallel, control
        self._close: Callable[[], None] | None = close
        self.capacity, self.prefill_chunk = inner.capacity, inner.prefill_chunk
        self.description = f"{parallel.num_ranks} ranks; rank 0: {inner.description}"
        self.kv_dtype, self.spec = inner.kv_dtype, inner.spec
        self.state = FirstRanksState(inner.state)
        self._decode = JointDecode(inner, control)
        self._layer_done: LayerProgress | None = None
        self._is_passing = False
        self._raised: BaseException | None = None  # by layer_done, in a joint pass

    @property
    def layer_done(self) -> LayerProgress | None:
        """Told of rank 0's layers, which are the others' too. What it raises in a pass of all ranks is raised
        when they have ended it: a rank that left half-way would leave the others waiting.
        """
        return self._layer_done

    @layer_done.setter
    def layer_done(self, callback: LayerProgress | None) -> None:
        self._layer_done = callback
        if not self._is_passing:
            self._inner.layer_done = callback

    @property
    def decodes_between_layers(self) -> bool:
        """Whether ``layer_done`` may run a batch of other sequences' next tokens: rank 0 decodes it between
        two layers of the pass of all ranks, which wait for it where they next exchange something."""
        return bool(getattr(self._inner, "decodes_between_layers", False))

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
        return f"{self._parallel.num_ranks} ranks: {prefill}", f"{self._decode.who}: {decode}"

    @property
    def is_loading(self) -> bool:
        """Whether rank 0 still pins its share of the experts."""
        return is_loading(self._inner)

    def load_progress(self) -> tuple[int, int]:
        """Rank 0's (bytes ready, bytes in all)."""
        return self._inner.load_progress() if isinstance(self._inner, Loads) else (0, 0)

    @property
    def last_prefill(self) -> object:
        """What rank 0 did in the last prefill, if its backend says; for benchmarks."""
        return getattr(self._inner, "last_prefill", None)

    def run(self, batch: Batch) -> Logits:
        """See ``runtime.backend.Backend``. Raises RankError if a rank fails; nothing works any more after
        it."""
        is_alone, is_between = self._inner.runs_alone(batch), self._is_passing
        if is_between and not is_alone:
            raise NativeError("between the layers of a pass only other sequences' tokens can be decoded")
        self._is_passing = True
        try:
            self._inner.state.begin(batch)  # an error here is no other rank's business
            if is_alone:
                self.state.begin(batch)
                if is_between:
                    return self._inner.run(batch, alone=True)
                with self._decode.token(batch):
                    return self._inner.run(batch, alone=True)
            return self._run_in_step(batch)
        finally:
            self._is_passing = is_between

    def _run_in_step(self, batch: Batch) -> Logits:
        """Passes of all ranks."""
        results: list[Logits] = []
        begin = 0
        while begin < len(batch.tokens):
            part = part_of(batch, begin, begin + self._inner.prefill_chunk)
            logits = self._run_part(part)
            if logits is None:
                continue  # with half as many tokens
            begin += len(part.tokens)
            if part is batch:
                return logits
            results.append(logits.copy())
        return np.concatenate(results)

    def _run_part(self, batch: Batch) -> Logits | None:
        """A pass of all ranks; None if one of them has no memory for so many tokens."""
        self._inner.state.begin(batch)  # after a pass that broke off: goes back
        shared = self.state.begin(batch)
        self._raised = None
        self._inner.layer_done = None if self._layer_done is None else self._tell
        try:
            with interrupts_deferred():
                self._decode.end()
                self._control.send("run", **written(batch), shared=shared)
                logits = run_in_step(self._inner, self._parallel, self._control, batch, shared)
        finally:
            self._inner.layer_done = self._layer_done
        self.prefill_chunk = self._inner.prefill_chunk
        if logits is not None:
            self.state.advance(batch)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        return logits

    def close(self) -> None:
        """See ``model.backend.Backend``."""
        if self._close is None:
            return
        close, self._close = self._close, None
        try:
            if self._control.failure is None:
                self._decode.end()
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
        if name == "decode":
            follow_decode(backend, control)
            continue
        batch, shared = read_batch(command), command["shared"]
        for span in batch.spans:
            backend.state.continue_at(span.slot, span.start)
        run_in_step(backend, parallel, control, batch, shared)


def run_in_step(
    backend: RankedBackend, parallel: Parallel, control: Control, batch: Batch, shared: Sequence[int]
) -> Logits | None:
    """One rank's part of a joint batch; None if any rank ran out of memory: then all compute fewer tokens in
    a pass from now on. shared: positions of each sequence that all ranks' caches hold; rank 0 sends those
    from there to where the sequence goes on."""
    logits = None
    with control.joint("prefill") as outcome:
        send_lacking(backend, parallel, batch, shared)
        try:
            logits = backend.run(batch)
        except OutOfDeviceMemoryError as error:
            outcome.own = f"rank {parallel.rank}: {error}"
        backend.compute_stream.synchronize()
    short = [words for words in outcome.all_ranks if words]
    if not short:
        return logits
    with control.joint("a smaller batch"):
        backend.shrink("; ".join(short))
    return None


def send_lacking(backend: RankedBackend, parallel: Parallel, batch: Batch, shared: Sequence[int]) -> None:
    """Gives all ranks the keys and values that only rank 0 has of a batch's sequences, and its states: others
    may have those of other positions."""
    stream, idle = backend.compute_stream, backend.idle_memory
    lacking = [
        (backend.kv_layers(span.slot), begin, span.start)
        for span, begin in zip(batch.spans, shared, strict=True)
        if begin < span.start
    ]
    for parts in zip(*([(*kv, begin, end) for kv in layers] for layers, begin, end in lacking), strict=True):
        parallel.send_kv(stream, [KvPart(*part) for part in parts], idle)
    for span in batch.spans:
        for low, high in backend.state_layers(span.slot) if span.start else ():
            parallel.send_kv(stream, [KvPart(low, high, 0, low.shape[1])], idle)


def written(batch: Batch) -> dict[str, Any]:
    """A batch as JSON has it."""
    spans = [(span.slot, span.first_row, span.rows, span.start, span.logits) for span in batch.spans]
    return {"tokens": batch.tokens.tolist(), "spans": spans}


def read_batch(command: Mapping[str, Any]) -> Batch:
    """What ``written`` wrote."""
    tokens = np.asarray(command["tokens"], dtype=np.int64)
    return Batch(tokens, tuple(Span(*words) for words in command["spans"]))
