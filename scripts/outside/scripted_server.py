"""krasis-serve without a model, for outside programs: it thinks, calls tools when asked to, and answers.

    python -m scripts.outside.scripted_server --port 8080

A question with the number 4711 gets a call of the first shell among the tools, ``echo 4711``; one about
weather a call of a weather tool; a tool's result is answered with it; all else with a greeting. The number
4712 makes it refuse a question with 429 when it comes first. Its tokenizer is the trained tiny model's, its
template is in Qwen3's form.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import click

from krasis.runtime.server.running import listen, run
from krasis.runtime.server.service import ServeSettings, Service
from krasis.runtime.serving.api import QueueFullError, Request
from krasis.runtime.text.assets import TextAssets
from tests.runtime.server.conftest import QWEN3, tiny_files
from tests.support.scripted_core import ScriptedCore, ScriptedTicket

SHELLS: dict[str, dict[str, Any]] = {  # agents' tools and what they want
    "Bash": {"command": "echo 4711", "description": "say 4711"},
    "bash": {"command": "echo 4711", "description": "say 4711"},
    "exec_command": {"cmd": "echo 4711"},
    "shell": {"command": ["echo", "4711"]},
    "run_shell_command": {"command": "echo 4711", "description": "say 4711", "is_background": False},
    "execute_command": {"command": "echo 4711", "requires_approval": False},
}
WEATHER = re.compile(r'"name": "(\w*weather\w*)"')
_CALL = "<tool_call>\n{}\n</tool_call>"


def script(assets: TextAssets) -> Callable[[Request], str]:
    """What the model says to a prompt."""

    def answer(request: Request) -> str:
        prompt = assets.tokenizer.decode(list(request.prompt), skip_special=False)
        thoughts = "Let me see.\n</think>\n\n" if prompt.endswith("<think>\n") else ""
        return thoughts + _said(prompt)

    return answer


def _said(prompt: str) -> str:
    last = prompt[prompt.rfind("<|im_start|>user") :]
    if "<tool_response>" in last:
        result = last.partition("<tool_response>")[2].partition("</tool_response>")[0]
        return f"The command said: {' '.join(result.split())[:200]}"
    if "4711" in last:
        for name, arguments in SHELLS.items():
            if f'"name": "{name}"' in prompt:
                return _CALL.format(json.dumps({"name": name, "arguments": arguments}))
    found = WEATHER.search(prompt)
    if found and "weather" in last.lower():
        return _CALL.format(
            json.dumps({"name": found[1], "arguments": {"location": "Paris", "city": "Paris"}})
        )
    return "Hello there."


class Busy(ScriptedCore):
    """A core that is busy when certain questions come first."""

    refused: ClassVar[set[str]] = set()

    def submit(self, request: Request) -> ScriptedTicket:
        """As a core's."""
        prompt = self.assets.tokenizer.decode(list(request.prompt), skip_special=False)
        if "4712" in prompt and prompt not in self.refused:
            self.refused.add(prompt)
            raise QueueFullError("too many requests wait already", retry_after_s=1)
        return super().submit(request)


def serve(
    port: int,
    *,
    context: int = 131072,
    prefill_s: float = 0.0,
    on_ready: Callable[[int], None],
    **settings: Any,
) -> None:
    """Serves until a signal comes. on_ready: called with the port."""
    files = tiny_files(QWEN3)
    assets = TextAssets.of_files(files, "scripted", 4096)
    core = Busy(assets, script(assets), context=context, prefill_s=prefill_s)
    listener = listen("127.0.0.1", port)

    def load() -> Service:
        chosen = ServeSettings(**{"aliases": ("scripted",), **settings})
        return Service(core, assets, chosen, lambda: files["tokenizer.json"])

    run([listener], load, core.close, lambda _: on_ready(listener.getsockname()[1]))


@click.command()
@click.option("--port", type=int, default=0)
@click.option("--context", type=int, default=131072)
@click.option("--prefill", "prefill_s", type=float, default=0.0, help="Seconds of each prompt's pass.")
@click.option("--strict", is_flag=True, help="As krasis-serve --strict.")
@click.option("--api-key", "api_keys", multiple=True)
@click.option("--log", is_flag=True, help="A line for each request, on stderr.")
def main(
    port: int, context: int, prefill_s: float, strict: bool, api_keys: tuple[str, ...], log: bool
) -> None:
    """Serve. The port goes to stdout when it is ready."""
    logging.basicConfig(level=logging.INFO if log else logging.WARNING, stream=sys.stderr)
    serve(
        port,
        context=context,
        prefill_s=prefill_s,
        on_ready=lambda number: print(number, flush=True),
        is_strict=strict,
        api_keys=api_keys,
    )


if __name__ == "__main__":
    main()
