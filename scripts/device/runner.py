"""Runs a stage in a process of its own: with a time limit, its output in a log, its result in a JSON file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.device.context import Context
from scripts.device.stages import STAGES, Stage
from scripts.device.state import Entry

ERROR_LINES, ERROR_CHARS = 6, 1200


class SkippedError(Exception):
    """The stage has nothing to do on this machine; the text says why."""


def run_stage(context: Context, stage: Stage, digest: str) -> Entry:
    """Never raises for the stage's own failure."""
    log = context.folder / "logs" / f"{stage.name}.log"
    result = result_path(context, stage.name)
    for path in (log, result):
        path.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            child_command(context, stage.name),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(context),
            start_new_session=True,  # so that all that it starts ends with it
        )
        try:
            code: int | str = process.wait(stage.limit_s)
        except subprocess.TimeoutExpired:
            code = f"over the limit of {stage.limit_s:.0f} s"
        finally:
            end_group(process)
    seconds = time.perf_counter() - begin
    if code == 0 and result.is_file():
        record: dict[str, Any] = json.loads(result.read_text("utf-8"))
        for status in ("failed", "skipped"):
            if status in record:
                error = str(record.pop(status))
                return Entry(stage.name, status, digest, seconds, record, error)
        return Entry(stage.name, "done", digest, seconds, record)
    return Entry(stage.name, "failed", digest, seconds, {}, f"exit {code}: {tail_of(log)}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def child_command(context: Context, name: str) -> list[str]:
    """How the same command is told to run one stage."""
    options: dict[str, object] = {
        "--dir": context.folder,
        "--device": context.device,
        "--size": context.size,
        "--wheels": context.wheels,
    }
    if context.ram_bytes is not None:
        options["--ram"] = context.ram_bytes / 1e9
    return [
        sys.executable,
        "-m",
        "scripts.device.run",
        "--child",
        name,
        *(str(part) for pair in options.items() for part in pair),
    ]


def child_environment(context: Context) -> dict[str, str]:
    """This process's, with what was installed for the check in front."""
    paths = [str(path) for path in (context.site, context.wheel_site) if path.is_dir()]
    before = os.environ.get("PYTHONPATH")
    libraries = context.site / "krasis" / "_lib"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        # An installation in a folder of its own is not where the libraries are looked for.
        **({"KRASIS_LIB_DIR": str(libraries)} if libraries.is_dir() else {}),
    }


def run_here(context: Context, name: str) -> None:
    """Runs a stage in this process and leaves its result where ``run_stage`` looks for it."""
    try:
        record = STAGES[name].load()(context)
    except SkippedError as reason:
        record = {"skipped": str(reason)}
    path = result_path(context, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, allow_nan=False), "utf-8")
    os.replace(temporary, path)  # noqa: PTH105


def result_path(context: Context, name: str) -> Path:
    return context.folder / "stages" / f"{name}.json"


def tail_of(log: Path) -> str:
    """The end of a log on one line, the last first: that is where an error says what it is."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    # Python marks the failing expression with a line of ^ and ~, which only makes sense in a file.
    told = [line for line in lines if line.strip("^~ ")][-ERROR_LINES:]
    return " | ".join(reversed(told))[:ERROR_CHARS]
