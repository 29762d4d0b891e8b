"""What streams that wait cost the one that is answered."""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

NUM_TOKENS = 1500
NUM_ROUNDS = 5
ASK: dict[str, Any] = {"prompt": "import json", "stream": True, "ignore_eos": True, "temperature": 0}


def measure(port: int, num_idle: int, num_tokens: int = NUM_TOKENS, num_rounds: int = NUM_ROUNDS) -> str:
    """One line: tokens a second of an answer beside num_idle streams that wait for its slot, and alone, each
    num_rounds times in turn."""
    tokens_s(port, num_tokens)  # everything is warm
    alone, beside = [], []
    for _ in range(num_rounds):
        alone.append(tokens_s(port, num_tokens))
        beside.append(tokens_s(port, num_tokens, num_idle))
    one, other = statistics.median(alone), statistics.median(beside)
    return (
        f"{one:.1f} tokens/s alone, {other:.1f} beside {num_idle} idle ({100 * (other / one - 1):+.1f} %): "
        f"medians of {min(alone):.1f} to {max(alone):.1f}, {min(beside):.1f} to {max(beside):.1f}"
    )


def tokens_s(port: int, num_tokens: int, num_idle: int = 0) -> float:
    """Of one answer, from the first token that all the others wait beside, to the last."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps({**ASK, "max_tokens": num_tokens}))
    reply = connection.getresponse()
    reply.readline()
    with _waiting(port, num_idle):
        begin, num_bytes = time.perf_counter(), 0
        first = reply.readline()
        while line := reply.readline():
            num_bytes += line.startswith(b"data: {")
        took_s = time.perf_counter() - begin
    connection.close()
    if not first:
        raise ValueError("the answer ended before all waited")
    return num_bytes / took_s


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
