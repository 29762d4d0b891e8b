"""Runs a program and keeps what a record needs of it; a program that fails is a result too."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.machine import load_1m

ERROR_CHARS = 240


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished program. error: empty if it exited with 0."""

    command: str
    output: str
    error: str
    started_s: float
    wall_s: float
    load_1m: float

    @property
    def facts(self) -> dict[str, Any]:
        """What goes into a ``Run`` as it is."""
        return {
            "command": self.command,
            "started_s": self.started_s,
            "wall_s": self.wall_s,
            "load_1m": self.load_1m,
        }


def shown(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """The command as one would type it."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    return f"{settings} {shlex.join(arguments)}".strip()


def run(arguments: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 900) -> Outcome:
    """Runs to the end or the time limit. Never raises for the program's own failure."""
    extra = dict(env or {})
    command = shown(arguments, extra)
    load, started_s, begin = load_1m(), time.time(), time.perf_counter()

    def outcome(output: str, error: str) -> Outcome:
        return Outcome(command, output, error, started_s, time.perf_counter() - begin, load)

    try:
        done = subprocess.run(
            arguments,
            env=os.environ | extra,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return outcome("", f"stopped after {timeout_s:.0f} s")
    except OSError as error:
        return outcome("", f"cannot be started: {error}")
    return outcome(done.stdout, failure(done.returncode, done.stderr or done.stdout))


def failure(code: int, text: str) -> str:
    """Why a program failed, in its own last words; empty for exit status 0."""
    if code == 0:
        return ""
    try:
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    except ValueError:
        name = f"signal {-code}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # An assertion of ggml is followed by what a debugger says of it.
    lines = [line for line in lines if "GGML_ASSERT" in line] or lines
    return f"{name}: {lines[-1][-ERROR_CHARS:]}" if lines else name
