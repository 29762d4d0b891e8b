"""Prompts whose pass takes long, by the real server, its engine's process and its scheduler: what was
computed is never computed again."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
PASS_S = 1.0
TASK = [
    {"role": "system", "content": "You help with code. " * 150},
    {"role": "user", "content": "Say hello."},
]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, "-m", "scripts.outside.scripted_server", "--prefill", str(PASS_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def ask(port: int, messages: list[Any], **more: Any) -> dict[str, Any]:
    """An answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": messages, **more}))
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def num_rows(port: int) -> int:
    """Rows that were computed in passes so far."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/metrics")
    found = re.search(
        r"^krasis_pass_rows_total (\S+)$", connection.getresponse().read().decode(), re.MULTILINE
    )
    connection.close()
    assert found is not None
    return int(float(found[1]))


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_clients_repeat_costs_one_pass(port: int, stream: bool) -> None:
    task = [*TASK[:1], {"role": "user", "content": f"Say hello {stream}. " * 100}]
    body = json.dumps({"messages": task, "stream": stream}).encode()
    before = num_rows(port)
    for _ in range(2):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        client.sendall(body)
        time.sleep(0.4)
        client.close()
    usage = ask(port, task)["usage"]
    # One pass in all; none, if the machine was so slow that the first client left before it began.
    assert num_rows(port) - before <= usage["prompt_tokens"]


def test_a_title_beside_a_conversation_takes_nothing_from_it(port: int) -> None:
    first = ask(port, TASK)
    for number in range(6):  # more than there are slots
        title = f"{number}: write a title. " + TASK[0]["content"][:600]
        ask(port, [{"role": "user", "content": title}], max_tokens=8)
    answer = first["choices"][0]["message"]
    second = ask(port, [*TASK, answer, {"role": "user", "content": "And again."}])
    assert cached(second) >= 0.95 * first["usage"]["prompt_tokens"]
