"""The server on a real socket: while it loads, when it ends, and with clients that behave badly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.server.running import listen
from tests.support.patience import PATIENCE_S

PROGRAM = Path(__file__).parent / "serve_scripted.py"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


@contextmanager
def served(
    load_s: float = 0.0, token_s: float = 0.0, *more: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, str(PROGRAM), str(load_s), str(token_s), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request(method, path, None if body is None else json.dumps(body))
    reply = connection.getresponse()
    found = (reply.status, reply.read(), {key.lower(): value for key, value in reply.getheaders()})
    connection.close()
    return found


def wait_until_ready(port: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while ask(port, "GET", "/health")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_answers_while_it_loads_and_ends_streams_at_sigterm() -> None:
    with served(1.0, 0.05) as (process, port):
        status, body, headers = ask(port, "POST", CHAT, ASK)
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["error"]["code"] == "loading"
        wait_until_ready(port)
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("POST", CHAT, json.dumps(ASK))
        reply = connection.getresponse()
        assert reply.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # once is enough
        rest = reply.read().decode()
        assert '"code":"shutting_down"' in rest
        assert rest.endswith("data: [DONE]\n\n")
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out) == (0, "saved\n"), err


def test_it_ends_in_order_while_it_loads() -> None:
    with served(0.5) as (process, port):
        assert ask(port, "GET", "/health")[0] == 503
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out, err) == (0, "saved\n", "")


def test_what_fails_to_load_ends_it() -> None:
    with served(0.0, 0.0, "fails") as (process, _):
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert "it cannot be loaded" in err


def test_clients_that_behave_badly() -> None:
    with served() as (process, port):
        wait_until_ready(port)
        # A sender that stops in the middle of its request.
        slow = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)
        slow.close()
        for text in (
            b"\x00\xff\r\n\r\n",
            b"GET\r\n\r\n",
            b"POST /v1/messages HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        ):
            rude = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
            rude.sendall(text)
            assert b" 400 " in rude.recv(1000)
            rude.close()
        # Fifty that leave as soon as they have asked.
        for _ in range(50):
            hasty = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
            body = json.dumps(ASK).encode()
            hasty.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            hasty.close()
        end = time.monotonic() + PATIENCE_S
        while b"num_requests_running 0.0" not in ask(port, "GET", "/metrics")[1]:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(port, "POST", CHAT, {**ASK, "stream": False, "max_tokens": 3})[0] == 200
        assert process.poll() is None


def test_offers_of_other_protocols_are_answered_in_this_one() -> None:
    """And nobody is told of them, whatever packages are installed."""
    with served() as (process, port):
        wait_until_ready(port)
        for protocol in ("h2c", "websocket"):
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            offer = {"Connection": "Upgrade", "Upgrade": protocol, "Sec-WebSocket-Version": "13"}
            offer["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
            connection.request("GET", "/health", headers=offer)
            reply = connection.getresponse()
            assert (reply.status, json.loads(reply.read())) == (200, {"status": "ok"})
            connection.close()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out, err) == (0, "saved\n", "")


def test_an_address_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(ResourceError, match="cannot be listened on"):
        listen("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ResourceError, match="cannot be listened on"):
        listen("no.such.host.invalid", 80)


def test_senders_of_slow_headers_are_let_go_and_others_are_not() -> None:
    with served(0.0, 0.05) as (_, port):
        wait_until_ready(port)
        begun: list[socket.socket] = []
        for sent in (b"", b"POST /v1/cha", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            begun.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
            begun[-1].sendall(sent)
        again = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answered = again.recv(4096)
        while not answered.endswith(b"}"):  # headers and body may come apart
            answered += again.recv(4096)
        assert answered.startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /hea")
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("POST", CHAT, json.dumps({**ASK, "max_tokens": 24}))
        reply = connection.getresponse()
        assert reply.read().endswith(b"data: [DONE]\n\n")  # 24 tokens take longer than headers may
        for one in [*begun, again]:
            assert one.recv(1) == b""
            one.close()
