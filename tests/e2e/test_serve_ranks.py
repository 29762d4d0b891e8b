"""krasis-serve on several ranks: answers are the engine's own, and it ends in order; a killed rank
costs what was under way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from rank_runs import needs_double

from krasis.runtime.engine import Engine
from krasis.runtime.settings import EngineSettings, SamplingSettings
from tests.support.patience import PATIENCE_S

pytestmark = needs_double
CODE = "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')"
# No two tokens of their answers are so near each other that rounding could choose.
PROMPTS = ([228, 93, 71, 230, 254], [189, 264, 147, 177, 281, 212, 184], [27, 111, 241])
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Any, tokenizer_json: bytes) -> Path:
    config = make_config(moe_intermediate_size=64)
    return make_bundle(config, seed=5, tokenizer=tokenizer_json, gpu_group=64, tiers=("gpu",))


def start(bundle: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(bundle), "--port", "0", "--device", "double", *options]
    command += ["--parallel", "3", "--ctx", "64", "--quiet"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1.*2 ranks", lines[-1])):
        assert lines[-1], "".join(lines)
        lines.append(process.stderr.readline())
    return int(found[1])


@contextmanager
def launched(bundle: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Both ranks as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = {"KRASIS_JOIN": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    words |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(bundle, **words, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def worker_of(pid: int) -> int:
    """The process of a server's other rank: a child of its engine's."""
    pids = [one for child in children_of(pid) for one in children_of(child)]
    (found,) = [one for one in pids if b"distributed.worker" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return found


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in children for word in path.read_text().split()]


def complete(port: int, prompt: list[int]) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    body = {"prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS}
    connection.request("POST", "/v1/completions", json.dumps(body))
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    return found


def test_answers_in_company_are_the_engines(bundle: Path) -> None:
    settings = EngineSettings(device="double", context=64, prefault=False)
    expected = []
    with Engine.open(bundle, settings) as engine:
        for prompt in PROMPTS:
            pieces = engine.generate(prompt, SamplingSettings(), max_tokens=MAX_TOKENS)
            expected.append("".join(piece.text for piece in pieces))
    with launched(bundle) as ranks, ThreadPoolExecutor(3) as pool:
        port = port_of(ranks[0])
        answers = list(pool.map(lambda prompt: complete(port, prompt), PROMPTS))
        for process in reversed(ranks):  # torchrun tells all
            process.send_signal(signal.SIGTERM)
        assert [process.wait(PATIENCE_S) for process in ranks] == [0, 0]
    assert [answer["choices"][0]["text"] for answer in answers] == expected


def test_a_killed_rank_ends_what_was_asked_and_the_engine_starts_again(bundle: Path) -> None:
    with start(bundle, "--gpus", "2") as server:
        try:
            port = port_of(server)
            first = complete(port, PROMPTS[0])
            os.kill(worker_of(server.pid), signal.SIGKILL)
            assert "ended: killed by SIGKILL" in json.dumps(complete(port, PROMPTS[1]))
            end = time.monotonic() + PATIENCE_S
            while "choices" not in (again := complete(port, PROMPTS[0])):
                assert time.monotonic() < end, again
                time.sleep(0.2)
            assert again["choices"] == first["choices"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE_S) == 0
            assert server.stderr is not None
            assert "ended: killed by SIGKILL); it starts again" in server.stderr.read()
        finally:
            server.kill()
