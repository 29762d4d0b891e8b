"""krasis-serve without a model, for outside programs: it thinks, calls tools when asked to, and answers.

    python -m scripts.outside.scripted_server --port 8080

A question with the number 4711 gets a call of the first shell among the tools, ``echo 4711``; one about
weather a call of a weather tool; a tool's result is answered with it; all else with a greeting. The number
4712 makes it refuse a question with 429 when it comes first. Its tokenizer is the trained tiny model's, its
template is in Qwen3's form; its engine is a process of its own, as krasis-serve's (``scripted_engine``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import click

from krasis.runtime.server.engine.launch import EngineProcess
from krasis.runtime.server.engine.life import EngineLife
from krasis.runtime.server.engine.remote_core import RemoteCore
from krasis.runtime.server.engine.restarts import Restarts
from krasis.runtime.server.running import listen, run
from krasis.runtime.server.service import ServeSettings, Service
from krasis.runtime.serving.api import QueueFullError, Request
from krasis.runtime.serving.ticket import QueuedTicket
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.ends import ends_of_text
from scripts.outside.scripted_engine import VOCAB, ScriptedOrder, files


class Busy(RemoteCore):
    """A core that is busy when certain questions come first."""

    def __init__(self, life: EngineLife, assets: TextAssets, max_waiting: int) -> None:
        def check_text(request: Request) -> None:
            ends_of_text(assets, request.prompt, request.stops, is_plain=request.is_plain, split=False)

        super().__init__(life, max_waiting=max_waiting, check_text=check_text)
        self._assets = assets
        self._refused: set[str] = set()

    def submit(self, request: Request) -> QueuedTicket:
        """As a core's."""
        prompt = self._assets.tokenizer.decode(list(request.prompt), skip_special=False)
        if "4712" in prompt and prompt not in self._refused:
            self._refused.add(prompt)
            raise QueueFullError("too many requests wait already", retry_after_s=1)
        return super().submit(request)


def serve(
    order: ScriptedOrder, port: int, queue: int, on_ready: Callable[[int], None], **settings: Any
) -> None:
    """Serves until a signal comes. on_ready: called with the port."""
    text = files()
    listener = listen("127.0.0.1", port)
    life = EngineLife(lambda _: EngineProcess("scripts.outside.scripted_engine").open(order), Restarts())
    life.begin()

    def load() -> Service:
        assets = TextAssets.of_files(text, "scripted", VOCAB)
        limits = {"max_requests": 4 * (queue + order.num_slots)}
        chosen = ServeSettings(**{"aliases": ("scripted",), **limits, **settings})
        return Service(Busy(life, assets, queue), assets, chosen, lambda: text["tokenizer.json"])

    run([listener], load, life.close, lambda _: on_ready(listener.getsockname()[1]), wait=life.wait)


@click.command()
@click.option("--port", type=int, default=0)
@click.option("--context", type=int, default=131072)
@click.option("--prefill", "prefill_s", type=float, default=0.0, help="Seconds of a long prompt's pass.")
@click.option("--token", "token_s", type=float, default=0.0, help="Seconds of a token.")
@click.option("--slots", "num_slots", type=int, default=4, help="Answers at a time.")
@click.option("--queue", type=int, default=64, help="Requests that may wait.")
@click.option("--strict", is_flag=True, help="As krasis-serve --strict.")
@click.option("--api-key", "api_keys", multiple=True)
@click.option("--log", is_flag=True, help="A line for each request, on stderr.")
def main(port: int, queue: int, strict: bool, api_keys: tuple[str, ...], log: bool, **order: Any) -> None:
    """Serve. The port goes to stdout when it is ready."""
    logging.basicConfig(level=logging.INFO if log else logging.WARNING, stream=sys.stderr)

    def on_ready(number: int) -> None:
        print(number, flush=True)

    serve(ScriptedOrder(**order), port, queue, on_ready, is_strict=strict, api_keys=api_keys)


if __name__ == "__main__":
    main()
