"""The process of an engine: how it is started, and how its end is told."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.server.engine.launch import EngineProcess


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "killed by SIGKILL"), (None, "exit code 0")])
def test_how_it_ended_is_told(number: int | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krasis.runtime.server.engine.launch._LEAVE_S", 60)  # on a busy machine
    engine = EngineProcess()
    if number is None:
        engine.channel.finish()  # nobody wants anything of it
    else:
        os.kill(engine.pid, number)
        assert engine.channel.receive() is None
    assert engine.ending() == words
    engine.kill()
    engine.kill()


def test_a_system_that_starts_no_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(ResourceError, match=r"cannot be started \(got Resource temporarily unavailable\)"):
        EngineProcess()
