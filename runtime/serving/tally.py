"""Counts what a core does, for those who watch it."""

from __future__ import annotations

from collections import Counter
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
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._pass_s = self._decode_s = 0.0
        self.mean_s = 1.0

    def submitted(self, *, is_refused: bool = False) -> None:
        """A request came, and was taken on or refused."""
        with self._lock:
            self._counts["num_requests"] += 1
            self._counts["num_refused"] += is_refused

    def looked_up(self, num_tokens: int, num_cached: int) -> None:
        """A prompt's prefix was looked for."""
        with self._lock:
            self._counts["num_prefix_queries"] += num_tokens
            self._counts["num_prefix_hits"] += num_cached

    def ran(self, run: Run, took_s: float) -> None:
        """A batch was computed."""
        counts = self._counts
        with self._lock:
            if run.is_pass:
                counts["num_passes"] += 1
                counts["num_shared_passes"] += len(run.parts) > 1
                counts["num_pass_rows"] += sum(part.rows for part in run.parts)
                self._pass_s += took_s
            else:
                counts["num_decode_steps"] += 1
                counts["num_decode_rows"] += len(run.parts)
                counts["num_drafts"] += any(part.guesses for part in run.parts)
                counts["num_drafted"] += sum(len(part.guesses) for part in run.parts)
                self._decode_s += took_s

    def accepted(self) -> None:
        """A guess was right."""
        with self._lock:
            self._counts["num_accepted"] += 1

    def ended(self, sequence: Sequence) -> None:
        """A request is over."""
        usage, timings = sequence.usage, sequence.timings
        took_s = timings.time_to_first_token_s + timings.decode_s
        with self._lock:
            self._counts["num_prompt_tokens"] += usage.num_prompt
            self._counts["num_generated_tokens"] += usage.num_generated
            self._finished[sequence.outcome] += 1
            self.mean_s = _SMOOTHING * self.mean_s + (1 - _SMOOTHING) * took_s

    def counters(self, store: PrefixStore, num_joined: int, num_restored: int) -> Counters:
        """The sums now."""
        with self._lock:
            return Counters(
                **self._counts,
                pass_s=self._pass_s,
                decode_s=self._decode_s,
                num_joined=num_joined,
                num_restored=num_restored,
                num_stored=store.num_stored,
                num_evicted=store.num_evicted,
                num_finished=dict(self._finished),
            )
