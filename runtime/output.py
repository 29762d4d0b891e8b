"""What krasis-run writes: answers to stdout as they come, notes and a progress bar to stderr."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from krasis.formats.printable import printable_lines
from krasis.runtime.generation import Answer, Generation
from krasis.runtime.thinking_view import ThinkingView

if TYPE_CHECKING:
    from tqdm import tqdm

    from krasis.runtime.engine import Engine

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def note(text: str) -> None:
    """A line on stderr."""
    print(printable_lines(text), file=sys.stderr, flush=True)


def safe_for_terminal(text: str) -> str:
    """text without control characters but newline and tab: a model must not drive the user's terminal."""
    return _CONTROL.sub("", text)


def write_text(text: str) -> None:
    """Part of an answer on stdout, at once."""
    sys.stdout.write(safe_for_terminal(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class PrefillBar:
    """A bar on stderr while a long prompt is computed; nothing where stderr is no terminal. It says what
    computes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bar: tqdm[Any] | None = None

    def update(self, done: int, total: int) -> None:
        """A prefill's progress callback."""
        if self._bar is None and done < total and sys.stderr.isatty():
            from tqdm import tqdm

            # The first chunk took an unknown time: the rate counts from the second.
            label = f"prompt on {self._engine.placement[0]}"
            self._bar = tqdm(total=total, initial=done, unit="tok", desc=label, leave=False, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self.close()

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
            bar.close()
            if show:
                view.write(piece)
    except KeyboardInterrupt:
        answer.stats.stop_reason = "interrupted"
    finally:
        answer.close()
        view.close()
    if show and (sys.stdout.isatty() or not answer.stats.text.endswith("\n")):
        write_text("\n")
    return answer.stats
