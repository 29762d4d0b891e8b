"""Real agents, headless, against a scripted server: one shell call, an answer, and what was computed twice.

    python -m scripts.outside.agents                # all; or --agent pi, which may be repeated

It fetches the agents from npm, pinned, into the cache folder (``--folder`` names another). Each gets a home
of its own and nothing of the environment. Asked to run ``echo 4711``, it must say what the command said, and
its second turn must begin with at least 95 % of the first prompt's tokens, whatever it asks beside it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from scripts.outside.surroundings import cache_folder

QUESTION = "Run echo 4711 in the shell and tell me what it said."
MODEL = "scripted"
LEAST_FOUND = 0.95
_REQUEST = re.compile(r"(\d+) tokens of prompt \((\d+) cached\), (\d+) generated")


@dataclass(frozen=True, slots=True)
class Agent:
    """package: of npm, with its version. command: its program and what comes before the question. files: of
    its home, by path, for a server's URL: texts, or what becomes JSON. variables: of its environment, for the
    URL."""

    package: str
    command: tuple[str, ...]
    files: Callable[[str], dict[str, object]] = lambda _: {}
    variables: Callable[[str], dict[str, str]] = lambda _: {}


def _pi(url: str) -> dict[str, object]:
    model = {"id": MODEL, "name": MODEL, "reasoning": False, "input": ["text"], "contextWindow": 131072}
    cost = {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
    provider = {
        "baseUrl": f"{url}/v1",
        "api": "openai-completions",
        "apiKey": "any",
        "models": [{**model, "maxTokens": 8192, "cost": cost}],
    }
    return {".pi/agent/models.json": {"providers": {"krasis": provider}}}


def _opencode(url: str) -> dict[str, object]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": "any"},
        "models": {MODEL: {"name": MODEL}},
    }
    config = {"provider": {"krasis": provider}, "model": f"krasis/{MODEL}", "autoupdate": False}
    return {"work/opencode.json": config}


def _codex(url: str) -> dict[str, object]:
    lines = (
        f'model = "{MODEL}"',
        'model_provider = "krasis"',
        "model_context_window = 131072",
        "[model_providers.krasis]",
        'name = "Krasis"',
        f'base_url = "{url}/v1"',
        'wire_api = "responses"',
    )
    return {".codex/config.toml": "\n".join(lines)}


def _openai(url: str) -> dict[str, str]:
    return {"OPENAI_API_KEY": "any", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": MODEL}


def _anthropic(url: str) -> dict[str, str]:
    quiet = {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "IS_SANDBOX": "1"}
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "any", "ANTHROPIC_MODEL": MODEL, **quiet}


AGENTS = {
    "codex": Agent(
        "@openai/codex@0.171.0",
        ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
        _codex,
    ),
    "pi": Agent(
        "@mariozechner/pi-coding-agent@0.73.1", ("pi", "-p", "--provider", "krasis", "--model", MODEL), _pi
    ),
    "qwen": Agent("@qwen-code/qwen-code@0.15.10", ("qwen", "--yolo", "-p"), variables=_openai),
    "opencode": Agent("opencode-ai@1.18.33", ("opencode", "run"), _opencode),
    "claude": Agent(
        "@anthropic-ai/claude-code@2.1.197",
        ("claude", "--dangerously-skip-permissions", "-p"),
        variables=_anthropic,
    ),
}


@contextmanager
def logged_server(log: Path) -> Iterator[str]:
    """The URL of a scripted server that writes a line for each request to log."""
    command = [sys.executable, "-m", "scripts.outside.scripted_server", "--log"]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline() if process.stdout else '')}"
        finally:
            process.terminate()
            process.wait(20)


def install(folder: Path, agent: Agent) -> Path:
    """The folder of its program."""
    programs = folder / "node_modules" / ".bin"
    if not (programs / agent.command[0]).exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run([*command, "--prefix", str(folder), agent.package], check=True)
    return programs


def ask(agent: Agent, programs: Path, url: str, timeout_s: float) -> str:
    """What the agent says."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "work").mkdir()
        for path, value in agent.files(url).items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        done = subprocess.run(
            [str(programs / agent.command[0]), *agent.command[1:], QUESTION],
            check=False,
            cwd=home / "work",
            env={"HOME": name, "PATH": os.environ["PATH"], "TERM": "dumb", **agent.variables(url)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    return done.stdout.decode(errors="replace")


def verdict(said: str, requests: Sequence[tuple[int, int, int]]) -> str:
    """What is wrong; nothing if all is well. requests: (prompt, cached, generated) of each."""
    if not re.search(r"The command said:.*4711", said):
        return f"it did not say what the command said: {said[-300:]!r}"
    if len(requests) < 2:
        return "there was no second turn"
    first = max(prompt for prompt, cached, _ in requests if cached < LEAST_FOUND * prompt)
    found = max(cached for _, cached, _ in requests)
    if found < LEAST_FOUND * first:
        return f"of a first prompt of {first} tokens {found} were found"
    return ""


@click.command()
@click.option("--agent", "names", multiple=True, type=click.Choice(sorted(AGENTS)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where npm installs.")
@click.option("--timeout", "timeout_s", type=float, default=300, help="Seconds for each.")
def main(names: Sequence[str], folder: Path | None, timeout_s: float) -> None:
    """Run the agents. Exit code 1 if one fails."""
    has_failed = False
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "requests.log"
        with logged_server(log) as url:
            for name in names or AGENTS:
                agent = AGENTS[name]
                programs = install(folder or cache_folder() / "agents", agent)
                begin = log.stat().st_size
                said = ask(agent, programs, url, timeout_s)
                lines = log.read_bytes()[begin:].decode(errors="replace")
                found = _REQUEST.findall(lines)
                requests = [(int(prompt), int(cached), int(count)) for prompt, cached, count in found]
                wrong = verdict(said, requests)
                has_failed |= bool(wrong)
                shown = ", ".join(f"{prompt} ({cached} found)" for prompt, cached, _ in requests)
                click.echo(f"{agent.package}: {wrong or 'well'}; prompts of {shown} tokens")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
