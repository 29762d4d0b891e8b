"""Runs a program and watches the memory it takes, on the host and on each GPU, and when it says what."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scripts.bench import process
from scripts.bench.machine import load_1m

SAMPLE_S = 0.25
MEMINFO = Path("/proc/meminfo")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Watched:
    """A finished program. stamps: (seconds since its start, line) of what it wrote to stderr.

    host_bytes: the most that memory in use grew above what it was before, page cache not counted but files in
    memory (tmpfs) counted. vram_bytes: the same of each GPU; empty without nvidia-smi.
    """

    outcome: process.Outcome
    stamps: tuple[tuple[float, str], ...]
    host_bytes: int
    vram_bytes: tuple[int, ...]


def run(arguments: Sequence[str], env: Mapping[str, str], timeout_s: float) -> Watched:
    """To its end or the time limit. Never raises for the program's own failure."""
    command = process.shown(arguments, env)
    load, started_s, begin = load_1m(), time.time(), time.perf_counter()
    host, gpus = HostMemory(), GpuMemory()
    output: list[str] = []
    stamps: list[tuple[float, str]] = []
    try:
        child = subprocess.Popen(
            arguments,
            env=os.environ | dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        gpus.stop()
        failed = process.Outcome(command, "", f"cannot be started: {error}", started_s, 0.0, load)
        return Watched(failed, (), 0, ())

    def collect(stream: IO[str], stamped: bool) -> None:
        for line in stream:
            if stamped:
                stamps.append((time.perf_counter() - begin, line.rstrip()))
            else:
                output.append(line)

    readers = [
        threading.Thread(target=collect, args=(stream, stamped))
        for stream, stamped in ((child.stdout, False), (child.stderr, True))
    ]
    for reader in readers:
        reader.start()
    late = False
    while child.poll() is None and not late:
        host.sample()
        time.sleep(SAMPLE_S)
        late = child.poll() is None and time.perf_counter() - begin > timeout_s
    end_group(child)  # also what a program left behind: it would be there while others are measured
    for reader in readers:
        reader.join()
    peaks = gpus.stop()
    said = "\n".join(line for _, line in stamps)
    error = f"stopped after {timeout_s:.0f} s" if late else process.failure(child.returncode, said)
    wall_s = time.perf_counter() - begin
    outcome = process.Outcome(command, "".join(output), error, started_s, wall_s, load)
    return Watched(outcome, tuple(stamps), host.grown_bytes, peaks)


def end_group(child: subprocess.Popen[str]) -> None:
    """Ends a program and the processes it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.wait()


class HostMemory:
    """How much more memory is in use than at the beginning."""

    def __init__(self) -> None:
        self._before = self._most = used_bytes()

    def sample(self) -> None:
        """Looks once."""
        self._most = max(self._most, used_bytes())

    @property
    def grown_bytes(self) -> int:
        """The most that was seen above the beginning."""
        return self._most - self._before


def used_bytes() -> int:
    """Memory that cannot be had without ending something: pages of files that also lie on a disk are free."""
    fields: dict[str, int] = {}
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    cache = fields["Cached"] - fields["Shmem"] + fields["Buffers"] + fields.get("SReclaimable", 0)
    return fields["MemTotal"] - fields["MemFree"] - cache


class GpuMemory:
    """The most memory in use on every GPU above the beginning, as nvidia-smi sees it."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []
        self._child: subprocess.Popen[str] | None = None
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return
        query = [tool, "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        once = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        self._before = [sample for line in once.stdout.splitlines() if (sample := _numbers(line))]
        self._child = subprocess.Popen(
            [*query, f"--loop-ms={int(SAMPLE_S * 1000)}"], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        if self._child is not None and self._child.stdout is not None:
            self._seen += [sample for line in self._child.stdout if (sample := _numbers(line))]

    def stop(self) -> tuple[int, ...]:
        """Bytes of each GPU, by its number."""
        if self._child is None:
            return ()
        self._child.terminate()
        self._child.wait()
        self._reader.join()
        most: dict[int, int] = {}
        for index, mebibytes in self._seen:
            most[index] = max(most.get(index, 0), mebibytes)
        before = dict(self._before)
        return tuple((most[index] - before.get(index, 0)) << 20 for index in sorted(most))


def _numbers(line: str) -> tuple[int, int] | None:
    """index and MiB; None for a line cut off or of a GPU that does not tell."""
    parts = [part.strip() for part in line.split(",")]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdigit, parts)) else None
