"""What streams that wait cost the one that is answered.

    python -m scripts.bench.serve_idle --streams 200 --token 0.008

asks a scripted server whose tokens take so many seconds, in which nothing is computed: what is lost is the
server's doing alone. ``scripts.bench.serve_load BUNDLE --idle-streams 200`` does the same with a model, whose
threads share the processor with the server and with who measures.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Thread
from typing import Any

import click

from scripts.bench.serve_load import engine_of, figures
from scripts.bench.serve_start import processor_s

NUM_TOKENS = 1500
NUM_ROUNDS = 5
ASK: dict[str, Any] = {"prompt": "import json", "stream": True, "ignore_eos": True, "temperature": 0}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one answer. tokens_s: a second. server_s, engine_s: processor time of the two processes, a token."""

    tokens_s: float
    server_s: float
    engine_s: float


def measure(
    process: int, port: int, num_idle: int, num_tokens: int = NUM_TOKENS, num_rounds: int = NUM_ROUNDS
) -> str:
    """Lines: tokens a second of an answer beside num_idle streams that wait for its slot, and alone, each
    num_rounds times in turn, and what the server's processes did for it. process: the server's number."""
    _answer(process, port, num_tokens)  # everything is warm
    alone, beside = [], []
    for _ in range(num_rounds):
        alone.append(_answer(process, port, num_tokens))
        beside.append(_answer(process, port, num_tokens, num_idle))
    one, other = (statistics.median(cost.tokens_s for cost in costs) for costs in (alone, beside))
    ranges = [f"{min(rates):.1f} to {max(rates):.1f}" for rates in map(_rates, (alone, beside))]
    lines = [
        f"{one:.1f} tokens/s alone, {other:.1f} beside {num_idle} idle ({100 * (other / one - 1):+.1f} %): "
        f"medians of {ranges[0]}, {ranges[1]}"
    ]
    for name in ("server", "engine"):
        took = [
            1000 * statistics.median(getattr(cost, f"{name}_s") for cost in costs)
            for costs in (alone, beside)
        ]
        lines.append(f"processor time of the {name}: {took[0]:.3f} ms a token alone, {took[1]:.3f} beside")
    return "\n".join(lines)


def _rates(costs: Sequence[Cost]) -> list[float]:
    return [cost.tokens_s for cost in costs]


def _answer(process: int, port: int, num_tokens: int, num_idle: int = 0) -> Cost:
    """One answer, from when all the others wait beside it to the last token."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps({**ASK, "max_tokens": num_tokens}))
    reply = connection.getresponse()
    reply.readline()
    num_frames = 0

    def read() -> None:
        nonlocal num_frames
        while line := reply.readline():
            num_frames += line.startswith(b"data: {")

    reader = Thread(target=read)
    reader.start()
    pids = (process, engine_of(process) or 0)
    with _waiting(port, num_idle):
        while figures(port)["krasis_num_requests_waiting"] < num_idle:
            time.sleep(0.05)
        begin, before, begin_s = time.perf_counter(), num_frames, [processor_s(pid) for pid in pids]
        reader.join()
        took_s, num_read = time.perf_counter() - begin, num_frames - before
        server_s, engine_s = (processor_s(pid) - then for pid, then in zip(pids, begin_s, strict=True))
    connection.close()
    if num_read < num_tokens / 10:
        raise ValueError("the answer had ended before all waited")
    return Cost(num_read / took_s, server_s / num_read, engine_s / num_read)


@contextmanager
def _waiting(port: int, num_idle: int) -> Iterator[None]:
    """Streams that wait for a slot."""
    body = json.dumps({**ASK, "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    idle = []
    try:
        for _ in range(num_idle):
            idle.append(socket.create_connection(("127.0.0.1", port), timeout=600))
            idle[-1].sendall(head + body)
        yield
    finally:
        for one in idle:
            one.close()


@click.command()
@click.option("--streams", "num_idle", type=int, default=200, show_default=True)
@click.option("--token", "token_s", type=float, default=0.008, show_default=True, help="Seconds of a token.")
@click.option("--tokens", "num_tokens", type=int, default=2 * NUM_TOKENS, show_default=True)
@click.option("--rounds", "num_rounds", type=int, default=NUM_ROUNDS, show_default=True)
def main(num_idle: int, token_s: float, num_tokens: int, num_rounds: int) -> None:
    """Measure one answer beside streams that wait, and alone."""
    command = [sys.executable, "-m", "scripts.outside.scripted_server", "--token", str(token_s)]
    command += ["--slots", "1", "--queue", str(2 * num_idle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline() if process.stdout else "")
        try:
            click.echo(measure(process.pid, port, num_idle, num_tokens, num_rounds))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
