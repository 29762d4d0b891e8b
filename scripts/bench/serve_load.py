"""krasis-serve under many clients that come and go: every request ends, no slot is lost, RAM stays flat.

    python -m scripts.bench.serve_load tiny.krasis --clients 32 --seconds 600 --disconnects 1000

Clients ask in all APIs, streamed and whole, go on with conversations or begin new ones, and some leave in the
middle. With ``--kill-engine S`` the engine's process is killed every S seconds. The exit code is 1 if a
request had no end, if a slot or a request is left over, if a process grew, or if the server does not end
with 0.

    python -m scripts.bench.serve_load tiny.krasis --idle-streams 200

measures one answer beside so many streams that wait, and alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import click

WORDS = ["what", "does", "this", "code", "do", "and", "why", "is", "the", "list", "empty", "json", "memory"]
COMMAND = "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')"
GROWTH = 1.10  # of resident memory, from a quarter of the time on
GROWTH_BYTES = 32 * 2**20
CACHE_BYTES = 64 * 2**20  # for prompts, which a young engine has yet to fill
MIN_LOOKS = 20  # at a process, to say that it grew
ENGINE = "krasis-engine"


@dataclass
class Load:
    """What all clients share. ends: how requests ended, counted."""

    port: int
    num_disconnects: int
    stop: Event = field(default_factory=Event)
    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def client(self, seed: int) -> None:
        """One client, till it is told to stop."""
        chance = random.Random(seed)
        history: list[dict[str, str]] = []
        while not self.stop.is_set():
            if not history or chance.random() < 0.3:
                history = []
            history.append(
                {"role": "user", "content": " ".join(chance.choices(WORDS, k=chance.randint(3, 60)))}
            )
            begin = time.perf_counter()
            try:
                end = self._ask(chance, history)
            except (OSError, HTTPException, ValueError) as error:
                end = f"broken: {type(error).__name__}: {error}"
            with self.lock:
                self.ends[end] += 1
                self.seconds.append(time.perf_counter() - begin)
            if end.startswith("refused"):
                self.stop.wait(0.2)  # less than it says in Retry-After, and no flood
            if end != "answered" or len(history) > 6:
                history = []
            else:
                history.append({"role": "assistant", "content": "Yes."})

    def _ask(self, chance: random.Random, history: list[dict[str, str]]) -> str:
        path = chance.choice(["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
        stream = chance.random() < 0.7
        body: dict[str, Any] = {"stream": stream, "max_tokens": chance.randint(1, 64), "temperature": 1}
        text = history[-1]["content"]
        body |= {"input": history, "prompt": text, "messages": history}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", path, json.dumps(body))
            if self._leaves(chance):
                time.sleep(chance.random() * 0.2)
                return "left"
            reply = connection.getresponse()
            if stream and reply.status == 200 and self._leaves(chance):
                reply.read(chance.randint(1, 400))
                return "left"
            return self._end_of(reply.status, reply.read(), stream)
        finally:
            connection.close()

    def _leaves(self, chance: random.Random) -> bool:
        with self.lock:
            if self.num_disconnects and chance.random() < 0.6:
                self.num_disconnects -= 1
                return True
        return False

    @staticmethod
    def _end_of(status: int, data: bytes, stream: bool) -> str:
        if status != 200:
            return f"refused with {status}" if json.loads(data).get("error") else f"broken: {status}"
        ended = data.endswith(b"data: [DONE]\n\n") or b"message_stop" in data
        ended |= b"response.completed" in data or b"response.incomplete" in data
        if stream and not ended:
            return "error in the stream" if b'"error"' in data else "broken: a stream without an end"
        return "answered"


@contextmanager
def server(bundle: Path, options: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """krasis-serve, ready, and its port."""
    command = [sys.executable, "-c", COMMAND, str(bundle), "--port", "0", "--quiet", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = ""
            while not (found := re.search(r":(\d+)/v1", line)):
                line = process.stderr.readline() if process.stderr else ""
                if not line:
                    raise click.ClickException("the server did not begin")
            yield process, int(found[1])
        finally:
            process.kill()


def figures(port: int) -> dict[str, float]:
    """/metrics, without labels."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {
        name: float(value)
        for name, _, value in (line.partition(" ") for line in lines)
        if "{" not in name and not name.startswith("#")
    }


def resident_bytes(pid: int | None) -> int:
    """What the process has in RAM; 0 if it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def engine_of(pid: int) -> int | None:
    """The process of a server's engine, None while there is none."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text("ascii").split():
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text("ascii").strip() == ENGINE:
                    return int(child)
    return None


def is_ready(port: int) -> bool:
    """Whether there is an engine that takes requests."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()


class Watch:
    """Looks at a server's processes once in a while, and kills its engine every kill_s.

    server, engines: bytes in RAM, the engine's apart for each process that it was, once it was ready.
    """

    def __init__(self, pid: int, port: int, kill_s: float | None) -> None:
        self.num_kills = 0
        self.server: list[int] = []
        self.engines: dict[int, list[int]] = {}
        self._pid, self._port, self._kill_s = pid, port, kill_s

    def until(self, end_s: float, pause_s: float) -> None:
        """Till then, by the monotonic clock."""
        killed_s = time.monotonic()
        while (now_s := time.monotonic()) < end_s:
            self.server.append(resident_bytes(self._pid))
            engine = engine_of(self._pid)
            if engine is not None:
                if is_ready(self._port):
                    self.engines.setdefault(engine, []).append(resident_bytes(engine))
                if self._kill_s is not None and now_s - killed_s > self._kill_s:
                    os.kill(engine, signal.SIGKILL)
                    killed_s, self.num_kills = now_s, self.num_kills + 1
            time.sleep(pause_s)

    def grown(self) -> list[str]:
        """What is wrong with the processes' memory."""
        names = {"server": self.server}
        names |= {f"engine {pid}": sizes for pid, sizes in self.engines.items() if len(sizes) >= MIN_LOOKS}
        faults = []
        for name, sizes in names.items():
            early, late = sizes[len(sizes) // 4], sizes[-1]
            is_young = self.num_kills and name != "server"
            if late > GROWTH * early + GROWTH_BYTES + (CACHE_BYTES if is_young else 0):
                faults.append(f"the {name} grew from {early} to {late} bytes")
        return faults

    def shown(self) -> str:
        """One line."""
        most = max((max(sizes) for sizes in self.engines.values()), default=0)
        early, late = self.server[len(self.server) // 4], self.server[-1]
        return (
            f"RAM: server {early >> 20} MiB early, {late >> 20} MiB late; engines, of which {self.num_kills} "
            f"were killed, {most >> 20} MiB at most"
        )


def wait_until_idle(port: int) -> dict[str, float]:
    """The figures when nothing is computed any more, or after a minute."""
    end = time.monotonic() + 60
    while True:
        found = figures(port)
        busy = found["krasis_num_requests_running"] + found["krasis_num_requests_waiting"]
        if not busy or time.monotonic() > end:
            return found
        time.sleep(0.2)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--clients", type=int, default=32, show_default=True)
@click.option("--seconds", type=float, default=600, show_default=True)
@click.option("--disconnects", type=int, default=1000, show_default=True)
@click.option("--kill-engine", "kill_s", type=float, help="Kill the engine's process every so many seconds.")
@click.option("--idle-streams", "num_idle", type=int, help="Measure an answer beside so many idle streams.")
@click.option("--option", "options", multiple=True, help="Of krasis-serve; may be repeated.")
def main(
    bundle: Path,
    clients: int,
    seconds: float,
    disconnects: int,
    kill_s: float | None,
    num_idle: int | None,
    options: tuple[str, ...],
) -> None:
    """Load a server of BUNDLE with clients."""
    if num_idle is not None:
        from scripts.bench.serve_idle import measure

        with server(bundle, ["--parallel", "1", "--queue", str(2 * num_idle), *options]) as (process, port):
            click.echo(measure(process.pid, port, num_idle))
        return
    with server(bundle, ["--cache-ram", f"{CACHE_BYTES}", *options]) as (process, port):
        load = Load(port, disconnects)
        threads = [Thread(target=load.client, args=(seed,), daemon=True) for seed in range(clients)]
        for thread in threads:
            thread.start()
        watch = Watch(process.pid, port, kill_s)
        watch.until(time.monotonic() + seconds, min(1.0, seconds / 40))
        load.stop.set()
        for thread in threads:
            thread.join(300)
        faults = [*_faults(load, wait_until_idle(port), process, port), *watch.grown()]
    for name, count in sorted(load.ends.items()):
        click.echo(f"{count:8} {name}")
    times = sorted(load.seconds)
    middle, last = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
    click.echo(
        f"{len(times)} requests, median {middle:.3f} s, 99 % below {last:.3f} s, {disconnects} to leave"
    )
    click.echo(watch.shown())
    click.echo("\n".join(faults) or "nothing is left over")
    sys.exit(bool(faults))


def _faults(load: Load, found: dict[str, float], process: subprocess.Popen[str], port: int) -> list[str]:
    faults = [f"{count} {name}" for name, count in load.ends.items() if name.startswith("broken")]
    if load.num_disconnects:
        faults.append(f"{load.num_disconnects} clients did not come to leave: there was too little time")
    if found["krasis_num_requests_running"] or found["krasis_num_requests_waiting"]:
        faults.append("requests are left over")
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/slots")
    slots = json.loads(connection.getresponse().read())
    connection.close()
    faults += [f"slot {one['id']} is still in use" for one in slots if one["is_processing"]]
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        code = None
    return [*faults, *([] if code == 0 else [f"the server ended with {code}"])]


if __name__ == "__main__":
    main()
