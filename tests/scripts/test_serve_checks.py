"""The checks of krasis-serve with outside programs and under load: what they take for well, and what not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.serve_load import Load
from scripts.outside.agents import verdict
from scripts.outside.llama_server_tests import krasis_options

ROOT = Path(__file__).parents[2]
SAID = "The command said: 4711"


def test_an_agent_is_well_if_its_second_turn_finds_the_first() -> None:
    title = (800, 5, 20)
    assert not verdict(SAID, [title, (9000, 5, 50), (9100, 9000, 10)])
    assert "found" in verdict(SAID, [title, (9000, 5, 50), (9100, 5000, 10)])
    assert "no second turn" in verdict(SAID, [(9000, 5, 50)])
    assert "did not say" in verdict("I cannot.", [(9000, 5, 50), (9100, 9000, 10)])


@pytest.mark.parametrize(
    ("status", "data", "stream", "end"),
    [
        (200, b"{}", False, "answered"),
        (200, b"data: {}\n\ndata: [DONE]\n\n", True, "answered"),
        (200, b"event: message_stop\ndata: {}\n\n", True, "answered"),
        (200, b"data: {}\n\n", True, "broken: a stream without an end"),
        (200, b'data: {"error":{}}\n\n', True, "error in the stream"),
        (429, b'{"error":{"message":"x"}}', True, "refused with 429"),
        (500, b"{}", False, "broken: 500"),
    ],
)
def test_how_a_request_ended(status: int, data: bytes, stream: bool, end: str) -> None:
    assert Load._end_of(status, data, stream) == end


def test_llama_servers_options_become_ours() -> None:
    given = ["--host", "127.0.0.1", "--ctx-size", "512", "--parallel", "2", "--no-slots", "--verbose"]
    options = krasis_options([*given, "--slot-save-path", "x", "--alias", "a,b", "--lora", "y"], 4096)
    pairs = " ".join(options)
    for wanted in ("--ctx 256", "--parallel 2", "--no-slots", "-vv", "--slot-save-path x", "--alias b"):
        assert wanted in pairs
    assert "--lora" not in options
    assert "--ctx 512" in " ".join(krasis_options([*given, "--kv-unified"], 4096))
    assert "--no-metrics" in options


def test_the_scripted_server_says_its_port_and_ends_in_order() -> None:
    command = [sys.executable, "-m", "scripts.outside.scripted_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.terminate()
        assert process.wait(30) == 0
