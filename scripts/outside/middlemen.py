"""Programs between people and the server: LiteLLM's proxy and Open WebUI, against a scripted server.

    python -m scripts.outside.middlemen                    # both; or --program litellm
    python -m scripts.outside.middlemen --folder /tmp/x    # where pip installs them (Open WebUI: 3 GB)

Each is installed from the package index, pinned, into an environment of its own, and started with the
settings that docs/SERVER.md tells people to copy. Then it is asked as its clients ask it: which models there
are, an answer, a streamed answer with usage, a tool call; LiteLLM also for what is too long for the context.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from krasis.formats.errors import UsageError
from scripts.outside.agents import DOCUMENT, HERE, documented
from scripts.outside.surroundings import cache_folder, fetched, scripted_server

CONTEXT = 4096
NUMBER = "4711"
GREETING = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@dataclass(slots=True)
class Place:
    """A server that is asked. url: without a slash at its end. key: of its clients."""

    url: str
    key: str = "any"

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """(status, text) of GET, or of POST with a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)  # noqa: S310 -- our own loopback URL
        given = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **headers}
        for name, value in given.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def wait(self, path: str, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Until it answers. Raises UsageError if it ends before, or takes longer."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and process.poll() is None:
            try:
                if self.ask(path)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise UsageError(f"{self.url} did not answer", got=f"exit code {process.poll()} in {timeout_s:g} s")


@dataclass
class Findings:
    """What was asked, and what of it was wrong."""

    asked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def see(self, what: str, is_well: bool, answer: object) -> None:
        """Notes a question."""
        self.asked.append(what)
        if not is_well:
            self.wrong.append(f"{what}: {str(answer)[:300]!r}")


def see_chat(place: Place, path: str, model: str, found: Findings) -> None:
    """An answer, a stream, a tool call."""
    body: dict[str, Any] = {"model": model, "messages": GREETING}
    status, text = place.ask(path, body)
    found.see("answer", status == 200 and bool(_message(text).get("content")), text)
    status, text = place.ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices"))
    tokens = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    found.see("stream", status == 200 and bool(said) and "[DONE]" in text, text)
    found.see("usage of a stream", bool(tokens) and tokens[-1] > 0, text)
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    status, text = place.ask(path, {**body, "messages": question, "tools": [WEATHER]})
    calls = _message(text).get("tool_calls") or [{}]
    found.see("tool call", calls[0].get("function", {}).get("name") == "get_weather", text)


def _message(text: str) -> dict[str, Any]:
    """The message of an answer; empty for anything else."""
    try:
        message = json.loads(text)["choices"][0]["message"]
    except (ValueError, LookupError, TypeError):
        return {}
    return message if isinstance(message, dict) else {}


def see_litellm(place: Place) -> Findings:
    """What LiteLLM's proxy gives its clients, in both languages."""
    found = Findings()
    place.key = master_key()
    status, text = place.ask("/v1/models")
    found.see("models", status == 200 and '"krasis"' in text, text)
    see_chat(place, "/v1/chat/completions", "krasis", found)
    body = {"model": "krasis", "max_tokens": 64, "messages": GREETING}
    status, text = place.ask("/v1/messages", body)
    found.see("answer to Anthropic's API", status == 200 and '"text"' in text, text)
    long = [{"role": "user", "content": "word " * (2 * CONTEXT)}]
    status, text = place.ask("/v1/chat/completions", {"model": "krasis", "messages": long})
    found.see("too long a prompt", status == 400 and "context" in text, f"{status} {text}")
    return found


def master_key() -> str:
    """What docs/SERVER.md has clients of the proxy send."""
    found = re.search(r"master_key: (\S+)", documented("LiteLLM", HERE))
    if found is None:
        raise UsageError(f"{DOCUMENT.name} has no master key of LiteLLM")
    return found[1]


def see_open_webui(place: Place) -> Findings:
    """What Open WebUI's page gets, by the requests that it makes."""
    found = Findings()
    status, text = place.ask("/api/v1/auths/signin", {"email": "", "password": ""})
    found.see("signing in", status == 200, text)
    place.key = json.loads(text).get("token", "") if status == 200 else ""
    status, text = place.ask("/api/models")
    models = [model["id"] for model in json.loads(text).get("data", [])] if status == 200 else []
    found.see("models", "scripted" in models, text)
    see_chat(place, "/api/chat/completions", "scripted", found)
    turns = [*GREETING, {"role": "assistant", "content": "Hello."}]
    status, text = place.ask("/api/v1/tasks/title/completions", {"model": "scripted", "messages": turns})
    found.see("title", status == 200 and bool(_message(text)), text)
    return found


def docker_variables(url: str) -> dict[str, str]:
    """The ``-e NAME=value`` of docs/SERVER.md's Open WebUI, for a server's URL."""
    text = documented("Open WebUI", url)
    found = dict(re.findall(r"-e (\w+)=(\S*)", text))
    if "OPENAI_API_BASE_URL" not in found:
        raise UsageError(f"{DOCUMENT.name} has no variables of Open WebUI for {HERE}")
    return found


def _litellm(home: Path, url: str, port: int) -> tuple[list[str], dict[str, str]]:
    (home / "config.yaml").write_text(documented("LiteLLM", url), "utf-8")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return ["litellm", "--config", str(home / "config.yaml"), *address], {}


def _open_webui(home: Path, url: str, port: int) -> tuple[list[str], dict[str, str]]:
    (home / "data").mkdir()
    kept = {"DATA_DIR": str(home / "data"), "WEBUI_SECRET_KEY": "any", "WEBUI_AUTH": "false"}
    away = {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai"}
    command = ["open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
    return command, {**docker_variables(url), **kept, **away}


@dataclass(frozen=True, slots=True)
class Program:
    """requirements: of pip, one after another. command: (home, the server's URL, port) -> (what starts it,
    its variables). ready: what it answers when it has started. see: the questions."""

    requirements: tuple[str, ...]
    command: Callable[[Path, str, int], tuple[list[str], dict[str, str]]]
    ready: str
    see: Callable[[Place], Findings]


PROGRAMS = {
    "litellm": Program(("litellm[proxy]==1.108.7",), _litellm, "/health/liveliness", see_litellm),
    "open-webui": Program(("torch==2.13.0", "open-webui==0.12.4"), _open_webui, "/health", see_open_webui),
}


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(program: Program, programs: Path, url: str, timeout_s: float) -> Iterator[Place]:
    """The program, started in a home of its own."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        place = Place(f"http://127.0.0.1:{free_port()}")
        command, variables = program.command(home, url, int(place.url.rpartition(":")[2]))
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        with (
            (home / "log").open("wb") as log,
            subprocess.Popen(
                command, cwd=home, env={"HOME": name, "PATH": path, **variables}, stdout=log, stderr=log
            ) as process,
        ):
            try:
                place.wait(program.ready, process, timeout_s)
                yield place
            except UsageError:
                click.echo((home / "log").read_text("utf-8", "replace")[-2000:], err=True)
                raise
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


@click.command()
@click.option("--program", "names", multiple=True, type=click.Choice(sorted(PROGRAMS)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where pip installs.")
@click.option("--timeout", "timeout_s", type=float, default=300, help="Seconds for a start.")
def main(names: Sequence[str], folder: Path | None, timeout_s: float) -> None:
    """Run the programs. Exit code 1 if one gets a wrong answer."""
    are_well = True
    for name in names or PROGRAMS:
        program = PROGRAMS[name]
        for requirement in program.requirements:
            programs = fetched((folder or cache_folder()) / name, requirement)
        with (
            scripted_server("--context", str(CONTEXT)) as port,
            running(program, programs, f"http://127.0.0.1:{port}", timeout_s) as place,
        ):
            found = program.see(place)
        are_well &= not found.wrong
        verdict = "; ".join(found.wrong) or "well"
        click.echo(f"{program.requirements[-1]}: {verdict} (asked: {', '.join(found.asked)})")
    sys.exit(not are_well)


if __name__ == "__main__":
    main()
