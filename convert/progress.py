"""What the user sees while it runs: one bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from krasis.formats.printable import printable_lines
from krasis.formats.units import format_bytes, format_seconds

PLAIN_INTERVAL_S = 10.0


class Reporter:
    """Messages and progress, on stderr. verbosity: 0 quiet (errors only), 1 usual, 2 detailed."""

    def __init__(self, verbosity: int = 1, stream: TextIO | None = None) -> None:
        self.verbosity = verbosity
        self._stream = stream if stream is not None else sys.stderr
        self._bar: tqdm[Any] | None = None
        self._total = self._done = self._first = 0
        self._started_s = self._last_line_s = 0.0

    @property
    def is_terminal(self) -> bool:
        """Whether somebody may be watching."""
        return self._stream.isatty()

    def say(self, text: str) -> None:
        """A line for everybody."""
        if self.verbosity >= 1:
            self._write(text)

    def detail(self, text: str) -> None:
        """A line for -v."""
        if self.verbosity >= 2:
            self._write(text)

    def warn(self, text: str) -> None:
        """Something that the user should know but that is no error; shown also when quiet."""
        self._write(f"note: {text}")

    def _write(self, text: str) -> None:
        text = printable_lines(text)  # it may quote a file
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """Starts the bar; ``done_bytes`` were converted by an earlier run."""
        self._total, self._done, self._first = total_bytes, done_bytes, done_bytes
        self._started_s = self._last_line_s = time.monotonic()
        if self.verbosity >= 1 and self._stream.isatty():
            self._bar = tqdm(
                total=total_bytes,
                initial=done_bytes,
                unit="B",
                unit_scale=True,
                desc="converting",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def advance(self, num_bytes: int) -> None:
        """Source bytes dealt with."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
            return
        now = time.monotonic()
        if self.verbosity >= 1 and now - self._last_line_s >= PLAIN_INTERVAL_S:
            self._last_line_s = now
            self._write(self._plain_line(now))

    def _plain_line(self, now_s: float) -> str:
        elapsed = max(now_s - self._started_s, 1e-6)
        rate = (self._done - self._first) / elapsed
        left = format_seconds((self._total - self._done) / rate) if rate > 0 else "unknown"
        return (
            f"converting: {100 * self._done / max(self._total, 1):.1f} %, {format_bytes(self._done)} of "
            f"{format_bytes(self._total)}, {rate / 1e9:.2f} GB/s, {left} left"
        )

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()
