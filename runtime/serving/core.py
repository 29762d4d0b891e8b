"""The one owner of a backend: takes requests from any thread and computes them in one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from threading import Condition, Event, Thread, get_ident
from typing import TypeVar

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Logits
from krasis.runtime.serving.admission import check_request
from krasis.runtime.serving.api import CoreClosedError, CoreStatus, QueueFullError, Request
from krasis.runtime.serving.between import Between
from krasis.runtime.serving.failures import as_krasis, is_lost
from krasis.runtime.serving.guessing import Guessing, batch_of_run
from krasis.runtime.serving.model_side import BatchBackend, CoreSettings, ModelSide
from krasis.runtime.serving.orders import Orders
from krasis.runtime.serving.prefix_folder import PrefixFolder
from krasis.runtime.serving.prefix_store import PrefixStore
from krasis.runtime.serving.scheduler import Scheduler
from krasis.runtime.serving.sequence import Sequence
from krasis.runtime.serving.slot_actions import SlotActions
from krasis.runtime.serving.slot_work import SlotWork
from krasis.runtime.serving.spiller import Spiller
from krasis.runtime.serving.steps import Job, Keep, Limits, Part, Place, Run, Sleep
from krasis.runtime.serving.tally import Tally
from krasis.runtime.serving.ticket import QueuedTicket

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RETRY_AFTER_S = 120.0
PROGRESS_PAUSE_S = 0.25


class EngineCore:
    """See ``api.Core``. ``start`` gives it a thread; or else the caller's thread calls ``run``, or ``turn``
    for one step. The backend is the core's from now on, and closed by ``close``.

    folder: prefixes on disk; None = they are kept in RAM alone. clock: seconds, for tests.
    """

    def __init__(
        self,
        backend: BatchBackend,
        model: ModelSide,
        settings: CoreSettings | None = None,
        folder: PrefixFolder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = settings or CoreSettings()
        self.settings, self.description = settings, backend.description
        self.context, self.vocab_size = backend.capacity, model.vocab_size
        self._backend, self._model, self._folder, self._clock = backend, model, folder, clock
        self._spiller = None if folder is None else Spiller(folder)
        self._store = PrefixStore(settings.cache_bytes, self._spiller.spill if self._spiller else None)
        limits = settings.limits or Limits(pass_rows=backend.prefill_chunk)
        num_slots = min(settings.num_slots, backend.state.num_slots, limits.pass_rows, backend.prefill_chunk)
        self._scheduler = Scheduler(
            replace(limits, pass_rows=min(limits.pass_rows, backend.prefill_chunk)), num_slots, self._store
        )
        self._tally = Tally()
        self._guessing = Guessing(backend, self._scheduler, self._tally)
        self._slots = SlotWork(backend.state, model.num_layers, self._store, self._guessing.forget)
        self._scheduler.cuts_tails = self._slots.cuts_tails
        for tokens, file in [] if folder is None else folder.prefixes():
            self._store.add_file(tokens, file, can_be_cut=self._slots.cuts_anywhere)
        self._between = Between(limits.between_s, getattr(backend, "decodes_between_layers", False))
        self._running: dict[str, Sequence] = {}  # of the core's thread: what it knows of, by the job's id
        self._changed = Condition()  # guards what follows
        self._inbox: list[Sequence] = []
        self._orders = Orders()
        self._open: dict[str, Sequence] = {}
        self._num_submitted = 0
        self._has_cancelled = self._is_closing = self._saves = False
        self._closed = Event()
        self._failure: BaseException | None = None  # what ended it
        self._runner: int | None = None  # the thread that is in ``run``

    def start(self) -> None:
        """Computes in a thread of its own from now on."""
        thread = Thread(target=self._run_quietly, name="krasis-core", daemon=True)
        thread.start()
        self._runner = thread.ident

    def submit(self, request: Request) -> QueuedTicket:
        """See ``api.Core``."""
        try:
            check_request(request, self.context, self.vocab_size, self.settings.num_slots)
            ends = self._model.ends(request)
            with self._changed:
                self._refuse_if_full()
                self._num_submitted += 1
                name = f"{self._num_submitted}:{request.id}"
                ticket = QueuedTicket(request.id, self._note_cancelled)
                sequence = Sequence(request, name, ticket, ends, self.context, self._clock())
                self._open[name] = sequence
                self._inbox.append(sequence)
                self._changed.notify_all()
        except KrasisError:
            self._tally.submitted(is_refused=True)
            raise
        self._tally.submitted()
        return ticket

    def in_turn(self, work: Callable[[], T]) -> Future[T]:
        """Does work in the core's thread, between batches. Any thread may call. Raises CoreClosedError."""
        with self._changed:
            if self._is_closing:
                raise CoreClosedError("the engine is closing")
            found = self._orders.add(work)
            self._changed.notify_all()
        return found

    def slot_actions(self, bundle: Bundle, folder: Path | None) -> SlotActions:
        """What an operator may do with the slots. folder: of their files; None = there are none."""
        slots, work = self._scheduler.slots, self._slots
        return SlotActions(self, slots, work, bundle, self._backend, folder)

    def status(self) -> CoreStatus:
        """See ``api.Core``."""
        slots = self._slots.status(tuple(self._scheduler.slots))
        with self._changed:
            running = sum(1 for one in self._open.values() if one.job.slot is not None)
            counters = self._tally.counters(self._store, self._scheduler.num_joined, self._slots.num_restored)
            return CoreStatus(
                num_running=running,
                num_waiting=len(self._open) - running,
                slots=slots,
                cache_usage=self._slots.usage(slots, self.context),
                store_bytes=self._store.num_bytes,
                num_stored=len(self._store),
                counters=counters,
                is_closing=self._is_closing,
            )

    def trouble(self) -> KrasisError | None:
        """See ``api.Core``."""
        return CoreClosedError("the engine is closing") if self._is_closing else None

    def close(self, save_prefixes: bool = True) -> None:
        """See ``api.Core``."""
        with self._changed:
            if not self._is_closing:
                self._is_closing, self._saves = True, save_prefixes
            runner = self._runner
            self._changed.notify_all()
        if runner is None:
            self._shut()
        elif runner != get_ident():  # else ``run`` does it when this call has returned to it
            self._closed.wait()

    def wait(self) -> BaseException | None:
        """Returns when it is closed: what ended it, None if that was ``close``."""
        self._closed.wait()
        return self._failure

    def _run_quietly(self) -> None:
        with suppress(Exception):  # ``run`` has logged it, and ``wait`` says it
            self.run()

    def run(self) -> None:
        """Computes till ``close`` is called; then ends what is open and frees the backend."""
        self._runner = get_ident()
        try:
            while not self._is_closing:
                self.turn()
        except BaseException as error:
            known = isinstance(error, KrasisError) and error.is_final
            logger.error("the engine's thread ends by an error: %s", error, exc_info=not known)
            with self._changed:
                self._is_closing, self._failure = True, error
            self._end_all(as_krasis(error))
            raise
        finally:
            self._shut()

    def turn(self, *, wait: bool = True) -> bool:
        """One step; False if there was nothing to do. wait: for something to do."""
        self._receive()
        step = self._scheduler.next(self._clock())
        if isinstance(step, Sleep):
            return self._sleep(step.until_s) if wait else False
        if isinstance(step, Run):
            self._run(step)
        elif isinstance(step, Place):
            self._place(step)
        elif isinstance(step, Keep):
            self._guarded(lambda: self._slots.keep(step.slot))
            self._scheduler.kept(step.slot)
        return True

    def _refuse_if_full(self) -> None:
        if self._is_closing:
            raise CoreClosedError("the engine is closing")
        still = [one for one in self._open.values() if not one.ticket.is_cancelled]
        waiting = sum(1 for one in still if one.job.slot is None)
        idle = sum(1 for slot in tuple(self._scheduler.slots) if slot.is_idle)
        if waiting - idle >= self.settings.max_waiting:
            raise QueueFullError(
                "too many requests wait already",
                retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, self._tally.mean_s * waiting)),
                got=waiting,
                limit=self.settings.max_waiting,
            )

    def _note_cancelled(self) -> None:
        with self._changed:
            self._has_cancelled = True
            self._changed.notify_all()

    def _receive(self) -> None:
        """Takes on what was submitted, and ends what was cancelled."""
        with self._changed:
            new, self._inbox = self._inbox, []
            has_cancelled, self._has_cancelled = self._has_cancelled, False
        self._orders.do_all()
        for sequence in new:
            self._running[sequence.job.id] = sequence
            self._scheduler.add(sequence.job)
        if has_cancelled:
            for sequence in [one for one in self._running.values() if one.ticket.is_cancelled]:
                sequence.cancel()
                self._over(sequence)

    def _sleep(self, until_s: float | None) -> bool:
        with self._changed:
            if not (self._inbox or self._orders or self._has_cancelled or self._is_closing):
                self._changed.wait(None if until_s is None else max(until_s - self._clock(), 0.0))
        return False

    def _place(self, step: Place) -> None:
        job, slot = step.job, step.slot
        try:
            self._slots.open(slot)
        except KrasisError as error:
            if len(self._scheduler.slots) > 1:
                logger.warning("there is one slot less: %s", error)
                self._scheduler.lose(slot)
                return
            self._end_by(self._running[job.id], error)
            return
        try:
            num_cached = self._slots.fill(slot, step.source)
        except Exception as error:
            logger.error("a slot cannot be filled: %s", error, exc_info=True)
            self._slots.close(slot)
            self._end_by(self._running[job.id], error)
            return
        self._scheduler.put(job, slot, num_cached)
        self._tally.looked_up(job.num_prompt if job.reads_cache else 0, num_cached)
        self._running[job.id].progress(num_cached, self._clock())

    def _run(self, run: Run, *, guesses: bool = True) -> None:
        begin_s = self._clock()
        self._scheduler.begin(run)
        for part in run.parts:
            self._running[part.job.id].begin(begin_s)
        try:
            if guesses:
                run = self._guessing.with_guesses(run, self._running[run.parts[0].job.id])
            logits = self._compute(run)
        except Exception as error:
            self._fail(run, error)  # whatever it is, it ends these requests and no other
            if (isinstance(error, KrasisError) and error.is_final) or is_lost(self._backend):
                raise
            return
        now_s = self._clock()
        if run.is_pass:
            begin_s += self._between.take_s()  # those seconds were the answers'
        self._scheduler.ran(run, begin_s, now_s)
        self._tally.ran(run, now_s - begin_s)
        if run.is_pass:
            self._slots.mark(part.job.slot for part in run.parts)
            self._scheduler.cuts_tails = self._slots.cuts_tails
        row = 0
        for part in run.parts:
            self._take(part, logits[row : row + part.num_logits], now_s)
            row += part.num_logits

    def _compute(self, run: Run) -> Logits:
        batch = batch_of_run(run)
        outer = self._backend.layer_done  # of the pass between whose layers this is, if there is one
        self._backend.layer_done = self._progress_of(run) if run.is_pass else None
        try:
            return self._backend.run(batch)
        finally:
            self._backend.layer_done = outer

    def _progress_of(self, run: Run) -> LayerProgress:
        """What is called after each layer of a pass: steps of the answers under way, and news."""
        said_s = self._clock()
        self._between.begin(said_s)

        def layer_done(num_done: int, num_layers: int) -> None:
            nonlocal said_s
            if num_done < num_layers and self._between.is_due(self._clock()):
                self._step_between()
            now_s = self._clock()
            if now_s - said_s < PROGRESS_PAUSE_S:
                return
            said_s = now_s
            for part in run.parts:
                self._running[part.job.id].progress(part.start + part.rows * num_done // num_layers, now_s)

        return layer_done

    def _step_between(self) -> None:
        """A token for each answer under way, between two layers of a pass."""
        run, begin_s = self._scheduler.between(), self._clock()
        if run is not None:
            self._run(run, guesses=False)
        self._between.stepped(begin_s, self._clock())

    def _take(self, part: Part, logits: Logits, now_s: float) -> None:
        """What one request makes of its rows. An error ends this request alone."""
        job, sequence = part.job, self._running[part.job.id]
        try:
            if part.start < job.num_prompt:
                sequence.progress(job.done, now_s)
            if part.logits == "all":
                sequence.score_prompt(logits, part.start)
            if sequence.ticket.is_cancelled:
                sequence.cancel()
            elif not job.remaining:
                self._guessing.take(part, sequence, logits, now_s)
        except Exception as error:
            logger.info("request %s failed", sequence.ticket.id, exc_info=True)
            sequence.fail(as_krasis(error))
        if part.guesses:
            self._settle(job)
        if sequence.is_over:
            self._over(sequence)

    def _settle(self, job: Job) -> None:
        """Takes a slot back over guesses that were not picked, before anybody else sees it."""
        if job.slot is not None:
            kept = self._slots.recover(job.slot, job.done)
            self._scheduler.advance(job, kept - job.done)  # what cannot be had of it is computed again

    def _fail(self, run: Run, error: Exception) -> None:
        """Ends the requests of a batch that the backend could not compute; what they had before is kept."""
        num_rows = sum(part.rows for part in run.parts)
        logger.error("a batch of %d rows failed: %s", num_rows, error, exc_info=True)
        for part in run.parts:
            slot = part.job.slot
            length = 0 if slot is None else self._slots.recover(slot, part.start)
            self._end_by(self._running[part.job.id], error, length)

    def _end_by(self, sequence: Sequence, error: Exception, length: int | None = None) -> None:
        sequence.fail(as_krasis(error))
        self._over(sequence, length)

    def _over(self, sequence: Sequence, length: int | None = None) -> None:
        """A request that is over leaves; its slot keeps what was computed (length: only so much)."""
        if length is None:
            self._slots.mark([sequence.job.slot])
        self._scheduler.end(sequence.job, self._clock(), length)
        del self._running[sequence.job.id]
        self._tally.ended(sequence)
        with self._changed:
            del self._open[sequence.job.id]

    def _end_all(self, error: KrasisError) -> None:
        with self._changed:
            new, self._inbox = self._inbox, []
        self._orders.do_all()
        self._running |= {one.job.id: one for one in new}
        for sequence in list(self._running.values()):
            sequence.fail(error)
            self._over(sequence)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (KrasisError, MemoryError) as error:
            logger.warning("a prefix is not kept: %s", error)

    def _shut(self) -> None:
        if self._closed.is_set():
            return
        self._end_all(CoreClosedError("the server is shutting down", hint="send the request again later"))
        with ExitStack() as last:
            last.callback(self._closed.set)  # also if the backend cannot close
            last.callback(self._backend.close)
            if self._spiller is not None:
                self._spiller.close()
            if self._saves and self._folder is not None:
                self._slots.save_all(self._scheduler.slots, self._folder)
