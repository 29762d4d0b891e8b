"""The engine's process of krasis-serve is lost, or its server's: what clients see of it, and what is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from scripts.bench.serve_load import Load, engine_of, wait_until_idle
from tests.support.patience import PATIENCE_S

CODE = "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')"
ASK = [{"role": "user", "content": "What does json.dumps do, and how is it not json.dump? " * 3}]


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", CODE, str(bundle), "--port", "0", "--quiet", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)):
                assert line, "the server ended"
                line = process.stderr.readline()
            yield process, int(found[1])
        finally:
            process.kill()


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request(method, path, None if body is None else json.dumps(body))
    reply = connection.getresponse()
    data = reply.read()
    headers = {key.lower(): value for key, value in reply.getheaders()}
    connection.close()
    return reply.status, json.loads(data) if data[:1] in (b"{", b"[") else data.decode(), headers


def wait_until_well(port: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while ask(port, "GET", "/health")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_engine(server: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while (engine := engine_of(server)) is None:  # the one before was killed, and the next is not yet
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(engine, signal.SIGKILL)


def wait_until_gone(pid: int | None) -> None:
    end = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)


LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True, "temperature": 1, "stream": True}
STREAMS = {
    "/v1/chat/completions": {**LONG, "messages": ASK},
    "/v1/completions": {**LONG, "prompt": "import json"},
    "/v1/messages": {**LONG, "messages": ASK},
    "/v1/responses": {**LONG, "input": "import json", "max_output_tokens": 1900},
}


def test_a_killed_engine_ends_what_it_was_asked_and_comes_again(trained_bundle: Path, tmp_path: Path) -> None:
    kept = ["--prefix-dir", str(tmp_path / "prefixes")]
    with served(trained_bundle, *kept) as (process, port):
        chat = {"messages": ASK, "temperature": 0, "max_tokens": 12}
        expected = ask(port, "POST", "/v1/chat/completions", chat)[1]["choices"]
        schema: dict[str, Any] = {"type": "object", "properties": {"a": {"const": 3}}, "required": ["a"]}
        schema["additionalProperties"] = False
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = ask(port, "POST", "/v1/chat/completions", {**chat, "response_format": form})[1]
        assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": 3}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    with served(trained_bundle, *kept) as (process, port):
        replies = []
        for path, body in STREAMS.items():
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            connection.request("POST", path, json.dumps(body))
            replies.append(connection.getresponse())
            assert replies[-1].readline()
        begin = time.monotonic()
        kill_engine(process.pid)
        for path, reply in zip(STREAMS, replies, strict=True):
            rest = reply.read().decode()
            assert "the engine ended while it worked on this request" in rest, (path, rest[-300:])
        assert time.monotonic() - begin < 20  # a second, on a machine that does nothing else
        status, body, headers = ask(port, "GET", "/health")
        if status != 200:  # it may be back already
            assert (status, body["error"]["code"]) == (503, "engine_lost")
            assert "the engine ended" in body["error"]["message"]
            assert int(headers["retry-after"]) >= 1
        wait_until_well(port)
        again = ask(port, "POST", "/v1/chat/completions", chat)[1]
        assert again["choices"] == expected
        usage = again["usage"]  # prefixes in files are there again
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1
        assert "krasis_engine_restarts_total 1.0" in ask(port, "GET", "/metrics")[1]
        # The weights are the engine's alone; and if the server dies, its engine does not stay.
        engine = engine_of(process.pid)
        assert f"{trained_bundle}/" in Path(f"/proc/{engine}/maps").read_text()
        assert f"{trained_bundle}/" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.kill()
        wait_until_gone(engine)


def test_an_engine_that_loads_ends_with_its_server(trained_bundle: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CODE, str(trained_bundle), "--port", "0"]) as process:
        end = time.monotonic() + PATIENCE_S
        while (engine := engine_of(process.pid)) is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
        wait_until_gone(engine)


def test_a_stopped_engine_holds_up_its_own_answers_only(trained_bundle: Path) -> None:
    with served(trained_bundle, "--ping-interval", "0.2") as (process, port):
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("POST", "/v1/chat/completions", json.dumps(STREAMS["/v1/chat/completions"]))
        reply = connection.getresponse()
        assert reply.readline()
        engine = engine_of(process.pid)
        assert engine is not None
        os.kill(engine, signal.SIGSTOP)
        begin = time.monotonic()
        assert ask(port, "GET", "/health")[0] == 200
        assert ask(port, "GET", "/metrics")[0] == 200
        assert time.monotonic() - begin < 20  # at once; it would be never
        frames = b""
        while frames.count(b'"delta":{}') < 3:  # nothing else says that it lives
            frames += reply.readline()
        os.kill(engine, signal.SIGCONT)
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_what_cannot_be_opened_is_told_with_its_exit_code(trained_bundle: Path) -> None:
    command = [
        sys.executable,
        "-c",
        CODE,
        str(trained_bundle),
        "--port",
        "0",
        "--ctx",
        "999999",
    ]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert found.returncode == 2
    assert found.stderr.count("the context is longer than the model allows") == 1


def test_clients_that_come_and_go_while_engines_are_killed(trained_bundle: Path) -> None:
    with served(trained_bundle, "--cache-ram", "16MiB") as (process, port):
        load = Load(port, 8)
        with ThreadPoolExecutor(8) as pool:
            try:
                for seed in range(8):
                    pool.submit(load.client, seed)
                for _ in range(2):
                    time.sleep(0.7)
                    kill_engine(process.pid)
                    wait_until_well(port)
                time.sleep(0.7)
            finally:
                load.stop.set()
        assert not [end for end in load.ends if end.startswith("broken")], load.ends
        assert load.ends["answered"]
        idle = wait_until_idle(port)
        assert idle["krasis_num_requests_running"] == idle["krasis_num_requests_waiting"] == 0
        assert not any(one["is_processing"] for one in ask(port, "GET", "/slots")[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
