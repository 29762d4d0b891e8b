"""Real agents, headless, against a scripted server: one shell call, an answer, and what was computed twice.

    python -m scripts.outside.agents                # all; or --agent pi, which may be repeated
    python -m scripts.outside.agents --prefill 330 --at-once --timeout 1200      # and nobody asks twice

It fetches the agents from npm, pinned, into the cache folder (``--folder`` names another). Each gets a home
of its own, nothing of the environment, and the settings that docs/SERVER.md tells people to copy. Asked to
run ``echo 4711``, it must say what the command said, and its second turn must begin with at least 95 % of the
first prompt's tokens, whatever it asks beside it. No prompt may come twice, however long its pass takes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from krasis.formats.errors import UsageError
from scripts.outside.surroundings import cache_folder

QUESTION = "Run echo 4711 in the shell and tell me what it said."
MODEL = "scripted"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "SERVER.md"
HERE = "http://127.0.0.1:8080"  # in the document
LEAST_FOUND = 0.95
_REQUEST = re.compile(r"(\d+) tokens of prompt \((\d+) cached\), (\d+) generated")


def documented(heading: str, url: str) -> str:
    """The first block of docs/SERVER.md under a heading, for a server's URL."""
    text = DOCUMENT.read_text("utf-8")
    found = re.search(rf"^### {heading}\n(?:(?!^#).)*?^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if found is None or HERE not in found[1]:
        raise UsageError(f"{DOCUMENT.name} has no settings of {heading}")
    return found[1].replace(HERE, url)


@dataclass(frozen=True, slots=True)
class Agent:
    """package: of npm, with its version. command: its program and what comes before the question. files: of
    its home, by path, for a server's URL: texts, or what becomes JSON. first: a line of shell before that,
    for it too. variables: of its environment."""

    package: str
    command: tuple[str, ...]
    files: Callable[[str], dict[str, object]] = lambda _: {}
    first: Callable[[str], str] = lambda _: ""
    variables: tuple[tuple[str, str], ...] = ()


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


AGENTS = {
    "codex": Agent(
        "@openai/codex@0.171.0",
        ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
        lambda url: {".codex/config.toml": documented("Codex", url)},
    ),
    "pi": Agent(
        "@mariozechner/pi-coding-agent@0.73.1", ("pi", "-p", "--provider", "krasis", "--model", MODEL), _pi
    ),
    "qwen": Agent(
        "@qwen-code/qwen-code@0.15.10",
        ("qwen", "--yolo", "-p"),
        lambda url: {".qwen/settings.json": documented("Qwen Code", url)},
    ),
    "opencode": Agent(
        "opencode-ai@1.18.33",
        ("opencode", "run"),
        lambda url: {"work/opencode.json": documented("opencode", url)},
    ),
    "claude": Agent(
        "@anthropic-ai/claude-code@2.1.197",
        ("claude", "--dangerously-skip-permissions", "-p"),
        lambda url: {".claude/settings.json": documented("Claude Code", url)},
        variables=(("IS_SANDBOX", "1"), ("DISABLE_TELEMETRY", "1")),
    ),
    "cline": Agent("cline@3.0.65", ("cline",), first=lambda url: documented("Cline", url)),
}


@contextmanager
def logged_server(log: Path, prefill_s: float) -> Iterator[str]:
    """The URL of a scripted server that writes a line for each request to log."""
    command = [sys.executable, "-m", "scripts.outside.scripted_server", "--log", "--prefill", str(prefill_s)]
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
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        done = subprocess.run(
            ["/bin/sh", "-c", f'{agent.first(url)}\nexec "$@"', "sh", *agent.command, QUESTION],
            check=False,
            cwd=home / "work",
            env={"HOME": name, "PATH": path, "TERM": "dumb", **dict(agent.variables)},
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
    sizes = [prompt for prompt, _, _ in requests]
    if len(set(sizes)) < len(sizes):
        return "it asked the same twice"
    return ""


def check(agent: Agent, programs: Path, prefill_s: float, timeout_s: float) -> tuple[bool, str]:
    """(whether it is well, a line about it), with a server of its own."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "requests.log"
        with logged_server(log, prefill_s) as url:
            try:
                said = ask(agent, programs, url, timeout_s)
            except subprocess.TimeoutExpired:
                said = f"nothing in {timeout_s:g} s"
        found = _REQUEST.findall(log.read_bytes().decode(errors="replace"))
    requests = [(int(prompt), int(cached), int(count)) for prompt, cached, count in found]
    wrong = verdict(said, requests)
    shown = ", ".join(f"{prompt} ({cached} found)" for prompt, cached, _ in requests)
    return not wrong, f"{agent.package}: {wrong or 'well'}; prompts of {shown} tokens"


@click.command()
@click.option("--agent", "names", multiple=True, type=click.Choice(sorted(AGENTS)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where npm installs.")
@click.option("--timeout", "timeout_s", type=float, default=300, help="Seconds for each.")
@click.option("--prefill", "prefill_s", type=float, default=0.0, help="Seconds of a long prompt's pass.")
@click.option("--at-once", is_flag=True, help="All of them beside each other.")
def main(
    names: Sequence[str], folder: Path | None, timeout_s: float, prefill_s: float, at_once: bool
) -> None:
    """Run the agents. Exit code 1 if one fails."""
    places = {name: install(folder or cache_folder() / "agents", AGENTS[name]) for name in names or AGENTS}
    are_well = []
    with ThreadPoolExecutor(len(places) if at_once else 1) as pool:
        jobs = [pool.submit(check, AGENTS[one], at, prefill_s, timeout_s) for one, at in places.items()]
        for job in as_completed(jobs):
            is_well, line = job.result()
            are_well.append(is_well)
            click.echo(line)
    sys.exit(not all(are_well))


if __name__ == "__main__":
    main()
