"""What krasis-run writes: answers to stdout as they come, notes and a progress bar to stderr."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Any

from krasis.formats.printable import printable_lines
from krasis.formats.process import stop_signals
from krasis.formats.process.standard_streams import write_output
from krasis.formats.units import format_bytes
from krasis.runtime.cli.thinking_view import ThinkingView
from krasis.runtime.generation import Answer, Generation

if TYPE_CHECKING:
    from tqdm import tqdm

    from krasis.runtime.engine import Engine

LEAST_RATED_S = 0.2  # of watching, for a rate that means something
_BIDI = "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates: they reorder what is read
# C0 but newline, tab and carriage return; DEL; C1; lone surrogates; the line separators that editors obey.
_CONTROL = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029{_BIDI}]")
_HIDDEN = re.compile(f"[{_BIDI}]")


def note(text: str) -> None:
    """A line on stderr. What is of a file or of a model in it cannot drive the terminal."""
    print(printable_lines(text), file=sys.stderr, flush=True)


def safe_for_terminal(text: str) -> str:
    """text with control characters escaped (``\\x1b``), all but newline and tab: nothing of a model, a bundle
    or a saved chat drives the user's terminal. Carriage returns are left out: they end lines elsewhere.
    """
    return _CONTROL.sub(_escaped, text.replace("\r", ""))


def hide_bidi(text: str) -> str:
    """text, as long as it was, with a mark for every character that would reorder the rest."""
    return _HIDDEN.sub("\ufffd", text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def write_text(text: str) -> None:
    """Part of an answer on stdout, at once: as it is into a file or pipe, made safe for a terminal.

    Raises OutputError if it cannot be written.
    """
    write_output(safe_for_terminal(text) if sys.stdout is not None and sys.stdout.isatty() else text)


class PrefillBar:
    """A bar on stderr while a long prompt is computed; nothing where stderr is no terminal. It says what
    computes, and what it waits for while weights are still being loaded.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bar: tqdm[Any] | None = None
        self._loaded: dict[str, tuple[float, int]] = {}  # when it was first seen, and the bytes then

    def update(self, done: int, total: int) -> None:
        """A prefill's progress callback. Raises KeyboardInterrupt if a signal asked the command to end."""
        stop_signals.check()
        if self._bar is None and done < total and sys.stderr.isatty():
            from tqdm import tqdm

            # The first chunk took an unknown time: the rate counts from the second.
            label = f"prompt on {self._engine.placement[0]}"
            self._bar = tqdm(total=total, initial=done, unit="tok", desc=label, leave=False, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            waits = self._loading()
            if waits or self._bar.postfix:
                self._bar.set_postfix_str(waits)
            if done == total:
                self.close()

    def _loading(self) -> str:
        """``waits for weights read: 12.1 of 117 GB, 3.0 GB/s``; empty if nothing is loaded."""
        found = self._engine.loading
        if found is None:
            return ""
        what, ready, total = found
        begin_s, first = self._loaded.setdefault(what, (time.monotonic(), ready))
        seconds = time.monotonic() - begin_s
        rate = f", {(ready - first) / seconds / 1e9:.1f} GB/s" if seconds > LEAST_RATED_S else ""
        return f"waits for {what}: {format_bytes(ready)} of {format_bytes(total)}{rate}"

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> PrefillBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream_answer(
    answer: Answer, bar: PrefillBar, *, show: bool = True, show_thinking: bool | None = None
) -> Generation:
    """Writes an answer as it comes. Ctrl-C ends it, not the program: the stats then say ``interrupted``.

    show_thinking: as for ``ThinkingView``.
    """
    view = ThinkingView(show_thinking)
    try:
        for piece in answer:
            stop_signals.check()
            bar.close()
            if show:
                view.write(piece)
    except KeyboardInterrupt:
        answer.stats.stop_reason = "interrupted"
    finally:
        answer.close()
        view.close()
    if show and ((sys.stdout is not None and sys.stdout.isatty()) or not answer.stats.text.endswith("\n")):
        write_text("\n")
    return answer.stats
