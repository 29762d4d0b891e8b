"""Kills conversions with SIGKILL and reports what they leave. Started by test_interruptions.py.

    python kill_server.py HF_DIR GGUF OUT NUM_TIMED NUM_CALLS SEED

NUM_TIMED conversions die after a random time; then one dies at each of the first NUM_CALLS system calls, in
turn before and after it. Every conversion continues what the one before it left. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

import xxhash

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.files.file_ops import FileOps


class KillOps(FileOps):
    """Dies at system call number ``call`` (from 1; 0: never), before or after it is done."""

    def __init__(self, call: int) -> None:
        self.left, self.late = call, call % 2 == 0

    def die_if(self, *, late: bool) -> None:
        if self.left == 0 and self.late == late:
            os.kill(os.getpid(), signal.SIGKILL)


def dying(name: str):
    def call(self, *arguments):
        self.left -= 1
        self.die_if(late=False)
        result = getattr(FileOps, name)(self, *arguments)
        self.die_if(late=True)
        return result

    return call


for _name in [name for name in vars(FileOps) if not name.startswith("_")]:
    setattr(KillOps, _name, dying(_name))


@dataclass
class Server:
    """This process never converts and has no threads, so it can fork; its children do the work."""

    paths: list[Path]
    out: Path
    killed: int = 0
    resumable: int = 0
    completed: int = 0
    wrong: list[str] = field(default_factory=list)
    reference: dict[str, str] = field(default_factory=dict)

    def start(self, call: int = 0) -> int:
        pid = os.fork()
        if pid == 0:
            status = 9
            try:
                reporter = Reporter(0, StringIO())
                settings = ConvertSettings(gpu_group=64)
                convert(prepare(self.paths, self.out, settings, reporter), reporter, KillOps(call))
                status = 0
            except BaseException as error:  # noqa: BLE001 -- a forked child must not return
                print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(status)
        return pid

    def digests(self) -> dict[str, str]:
        """The journal's removal is the very last step, and readers ignore it."""
        files = [path for path in self.out.iterdir() if path.name != "journal.jsonl"]
        return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}

    def collect(self, pid: int) -> None:
        status = os.waitpid(pid, 0)[1]
        self.killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and status != 0:
            self.wrong.append(f"a conversion failed with status {status}")
        partial = self.out.with_name(f"{self.out.name}.partial")
        others = {path.name for path in self.out.parent.iterdir()} - {self.out.name, partial.name}
        if others:
            self.wrong.append(f"left behind: {sorted(others)}")
        journal = partial / "journal.jsonl"
        self.resumable += journal.exists() and journal.read_bytes().count(b"\n") > 1
        if self.out.exists():
            self.completed += 1
            if self.digests() != self.reference:
                self.wrong.append("a finished bundle differs")
            self.remove()

    def remove(self) -> None:
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()


def main() -> None:
    hf, gguf, out, num_timed, num_calls, seed = sys.argv[1:]
    server = Server([Path(hf), Path(gguf)], Path(out))
    begin = time.monotonic()
    os.waitpid(server.start(), 0)
    usual_s = time.monotonic() - begin
    server.reference = server.digests()
    server.remove()
    rng = random.Random(int(seed))
    while server.killed < int(num_timed) and not server.wrong:
        pid = server.start()
        time.sleep(rng.uniform(0, usual_s))
        os.kill(pid, signal.SIGKILL)
        server.collect(pid)
    for call in range(1, int(num_calls) + 1):
        server.collect(server.start(call))
    server.collect(server.start())
    leftovers = [path.name for path in server.out.parent.iterdir()]
    print(json.dumps({**asdict(server), "leftovers": leftovers}, default=str))


if __name__ == "__main__":
    main()
