"""Counts what a core does, for those who watch it."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock

from krasis.runtime.serving.api import Counters
from krasis.runtime.serving.prefix_store import PrefixStore
from krasis.runtime.serving.sequence import Sequence
from krasis.runtime.serving.steps import Run

_SMOOTHING = 0.9


class Tally:
    """See ``api.Counters``. Any thread may call. mean_s: how long requests took of late."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sums = Counters()
        self._finished: dict[str, int] = {}
        self.mean_s = 1.0

    def submitted(self) -> None:
        """A request was taken on."""
        self._add(num_requests=1)

    def refused(self) -> None:
        """A request was not."""
        self._add(num_requests=1, num_refused=1)

    def looked_up(self, num_tokens: int, num_cached: int) -> None:
        """A prompt's prefix was looked for."""
        self._add(num_prefix_queries=num_tokens, num_prefix_hits=num_cached)

    def ran(self, run: Run, took_s: float) -> None:
        """A batch was computed."""
        rows = sum(part.rows for part in run.parts)
        if run.is_pass:
            self._add(
                num_passes=1, num_shared_passes=int(len(run.parts) > 1), num_pass_rows=rows, pass_s=took_s
            )
        else:
            self._add(num_decode_steps=1, num_decode_rows=rows, decode_s=took_s)

    def ended(self, sequence: Sequence) -> None:
        """A request is over."""
        usage, timings = sequence.usage, sequence.timings
        took_s = timings.time_to_first_token_s + timings.decode_s
        self._add(num_prompt_tokens=usage.num_prompt, num_generated_tokens=usage.num_generated)
        with self._lock:
            self._finished[sequence.outcome] = self._finished.get(sequence.outcome, 0) + 1
            self.mean_s = _SMOOTHING * self.mean_s + (1 - _SMOOTHING) * took_s

    def counters(self, store: PrefixStore, num_joined: int, num_restored: int) -> Counters:
        """The sums now."""
        with self._lock:
            return replace(
                self._sums,
                num_joined=num_joined,
                num_restored=num_restored,
                num_stored=store.num_stored,
                num_evicted=store.num_evicted,
                num_finished=dict(self._finished),
            )

    def _add(self, **more: float) -> None:
        with self._lock:
            sums = {name: getattr(self._sums, name) + value for name, value in more.items()}
            self._sums = replace(self._sums, **sums)
