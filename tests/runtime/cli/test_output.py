"""What goes to the terminal: the bar of a long prompt, and nothing that could drive the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from krasis.runtime.cli.output import PrefillBar, safe_for_terminal


class Stream(io.StringIO):
    """Text that was written, to a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def bar_output(
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    steps: list[int],
    total: int,
    loading: Sequence[tuple[str, int, int] | None] = (None,),
) -> str:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    left = iter([*loading, *[None] * len(steps)])

    class Engine:
        placement = ("GPU", "CPU")

        @property
        def loading(self) -> tuple[str, int, int] | None:
            return next(left)

    engine: Any = Engine()
    with PrefillBar(engine) as bar:
        for step in steps:
            bar.update(step, total)
    return stream.getvalue()


def test_a_long_prompt_shows_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    text = bar_output(monkeypatch, True, [512, 1024, 1536, 2048], 2048)
    assert "prompt on GPU" in text
    assert "512/2048" in text
    assert text.endswith("\r")


def test_the_bar_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 10.0, 10.0, 12.0])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("krasis.runtime.cli.output.time", clock)
    loading = [("experts pinned", 10**10, 117 * 10**9), ("experts pinned", 16 * 10**9, 117 * 10**9)]
    text = bar_output(monkeypatch, True, [1, 1000, 1001, 2048], 2048, loading)
    assert "waits for experts pinned: 10.0 GB of 117.0 GB]" in text
    assert "waits for experts pinned: 16.0 GB of 117.0 GB, 3.0 GB/s" in text
    assert "waits" not in [shown for shown in text.split("\r") if shown.strip()][-1]


@pytest.mark.parametrize(("terminal", "steps"), [(True, [2048]), (False, [512, 2048])])
def test_short_prompts_and_pipes_show_none(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: list[int]
) -> None:
    assert bar_output(monkeypatch, terminal, steps, 2048) == ""


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert safe_for_terminal("a\x1b[2Jb\x07\x9bc\r\n\td\x7f é🙂") == "a\\x1b[2Jb\\x07\\x9bc\n\td\\x7f é🙂"
    assert safe_for_terminal("\x1b]52;c;AAAA\x07") == "\\x1b]52;c;AAAA\\x07"
    assert safe_for_terminal("a\u202eb\u2066c\ud800") == "a\\u202eb\\u2066c\\ud800"
    # What writing needs stays: joiners, variation selectors, marks of right-to-left text.
    assert safe_for_terminal("👩\u200d🔬 ❤\ufe0f \u200fعربي") == "👩\u200d🔬 ❤\ufe0f \u200fعربي"
