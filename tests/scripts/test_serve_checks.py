"""The checks of krasis-serve with outside programs and under load: what they take for well, and what not."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import ANY

import pytest

from krasis.formats.errors import UsageError
from scripts.bench.serve_load import Load
from scripts.outside.agents import AGENTS, documented, verdict
from scripts.outside.llama_server_tests import krasis_options
from scripts.outside.middlemen import docker_variables, master_key
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
SAID = "The command said: 4711"


def test_an_agent_is_well_if_its_second_turn_finds_the_first() -> None:
    title = (800, 5, 20)
    assert not verdict(SAID, [title, (9000, 5, 50), (9100, 9000, 10)])
    assert "found" in verdict(SAID, [title, (9000, 5, 50), (9100, 5000, 10)])
    assert "no second turn" in verdict(SAID, [(9000, 5, 50)])
    assert "the same twice" in verdict(SAID, [(9000, 5, 50), (9000, 8999, 50), (9100, 9000, 10)])
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


def test_agents_get_the_settings_that_people_are_told_to_copy() -> None:
    for name, agent in AGENTS.items():
        url = "http://127.0.0.1:4711"
        texts = [*map(str, agent.files(url).values()), agent.first(url)]
        assert any(url in one for one in texts), name
        for path, text in agent.files(url).items():
            if isinstance(text, str):
                assert tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    with pytest.raises(UsageError, match="no settings of Nobody"):
        documented("Nobody", "x")


def test_programs_in_between_get_the_settings_that_people_are_told_to_copy() -> None:
    url = "http://127.0.0.1:4711"
    assert docker_variables(url)["OPENAI_API_BASE_URL"] == f"{url}/v1"
    text = documented("LiteLLM", url)
    assert f"api_base: {url}/v1" in text
    assert f"master_key: {master_key()}\n" in text


def test_llama_servers_options_become_ours(tmp_path: Path) -> None:
    given = ["--host", "127.0.0.1", "--ctx-size", "512", "--parallel", "2", "--no-slots", "--verbose"]
    options = krasis_options(
        [*given, "--slot-save-path", "x", "--alias", "a,b", "--lora", "y"], 4096, tmp_path
    )
    pairs = " ".join(options)
    for wanted in ("--ctx 256", "--parallel 2", "--no-slots", "-vv", "--slot-save-path x", "--alias b"):
        assert wanted in pairs
    assert "--lora" not in options
    assert "--ctx 512" in " ".join(krasis_options([*given, "--kv-unified"], 4096, tmp_path))
    assert "--no-metrics" in options
    variables = json.loads(options[options.index("--chat-template-kwargs") + 1])
    assert variables == {"date_string": ANY, "datetime": ANY}
    options = krasis_options(["--chat-template", "llama3", "--reasoning", "off"], 4096, tmp_path)
    assert "<|start_header_id|>" in Path(options[options.index("--chat-template") + 1]).read_text()
    assert json.loads(options[-1])["enable_thinking"] is False


def test_the_scripted_server_says_its_port_and_ends_in_order() -> None:
    command = [sys.executable, "-m", "scripts.outside.scripted_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
