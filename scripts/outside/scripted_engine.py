"""The engine's process of a server without a model: scheduler, slots and stored prompts are the real ones,
the backend writes what a script says.

It thinks if it is asked to, calls tools when a question wants it to, and answers; see ``scripted_server``.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from krasis.runtime.batch import Batch
from krasis.runtime.server.engine.channel import Channel
from krasis.runtime.server.engine.child import NAME
from krasis.runtime.server.engine.host import EngineHost
from krasis.runtime.server.grammar import Grammar, Grammars, MaskRecipe
from krasis.runtime.serving.api import Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings, ModelSide
from krasis.runtime.serving.ticket import QueuedTicket
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.ends import TextEnds, ends_of_text
from tests.runtime.server.conftest import QWEN3, tiny_files
from tests.support.scripted_backend import NUM_LAYERS, ScriptedBackend

VOCAB = 4096
CACHE_BYTES = 2**24  # 16 bytes a token
LONG_PASS = 256  # rows; what has fewer takes no time
SHELLS: dict[str, dict[str, Any]] = {  # agents' tools and what they want
    "Bash": {"command": "echo 4711", "description": "say 4711"},
    "bash": {"command": "echo 4711", "description": "say 4711"},
    "exec_command": {"cmd": "echo 4711"},
    "run_commands": {"commands": ["echo 4711"]},
    "shell": {"command": ["echo", "4711"]},
    "run_shell_command": {"command": "echo 4711", "description": "say 4711", "is_background": False},
    "execute_command": {"command": "echo 4711", "requires_approval": False},
}
WEATHER = re.compile(r'"name": "(\w*weather\w*)"')
_CALL = "<tool_call>\n{}\n</tool_call>"
MOST_CHOICES = 256  # of what may come next
_STEP = 500.0  # between logits: no temperature and no bias changes their order


@dataclass(frozen=True, slots=True)
class ScriptedOrder:
    """What to open. prefill_s: how long the pass of a long prompt takes; token_s: a token."""

    context: int
    prefill_s: float = 0.0
    token_s: float = 0.0
    num_slots: int = 4

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return asdict(self)


def files() -> dict[str, bytes]:
    """The text side: the trained tiny model's tokenizer, a template in Qwen3's form."""
    return tiny_files(QWEN3)


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


class ToldBackend(ScriptedBackend):
    """Its answers are told by prompt. Where a mask forbids what comes next, it goes on with the first of the
    rest that is allowed."""

    def __init__(self, order: ScriptedOrder, end: int) -> None:
        super().__init__(
            vocab=VOCAB,
            num_slots=order.num_slots,
            capacity=order.context,
            prefill_chunk=order.context,
            token_s=order.token_s,
        )
        self._prefill_s, self._end = order.prefill_s, end
        self._told: dict[tuple[int, ...], list[int]] = {}
        self._read: dict[tuple[int, ...] | None, tuple[tuple[int, ...], int]] = {}

    def tell(self, prompt: tuple[int, ...], answer: list[int]) -> None:
        """What it will say; of several answers to one prompt, which begin alike, the longest."""
        longest = max(answer, self._told.get(prompt, []), key=len)
        self._told = {**self._told, prompt: longest}  # the core's thread may look at the one before

    def run(self, batch: Batch) -> np.ndarray:
        self.pass_s = self._prefill_s if any(span.rows >= LONG_PASS for span in batch.spans) else 0.0
        found = super().run(batch)
        self.batches.clear()
        return found

    def scores(self, tokens: tuple[int, ...]) -> np.ndarray:
        scores = np.full(VOCAB, -_STEP * VOCAB)
        lengths = {len(prompt) for prompt in self._told if len(prompt) <= len(tokens)}
        prompt = next(
            (tokens[:size] for size in sorted(lengths, reverse=True) if tokens[:size] in self._told), None
        )
        told, written = ([], ()) if prompt is None else (self._told[prompt], tokens[len(prompt) :])
        before, at = self._read.get(prompt, ((), 0))  # what was written then, and how much of the told it was
        if before != written[:-1]:
            before, at = (), 0
        for token in written[len(before) :]:
            at = told.index(token, at) + 1 if token in told[at:] else len(told)
        self._read[prompt] = written, at
        for place, token in reversed(list(enumerate([*told[at : at + MOST_CHOICES], self._end]))):
            scores[token] = -_STEP * place
        return scores


class ToldCore(EngineCore):
    """Tells the backend what each request shall be answered."""

    def __init__(self, order: ScriptedOrder, assets: TextAssets) -> None:
        def ends(request: Request) -> TextEnds:
            plain, split = request.is_plain, request.split_thinking
            return ends_of_text(assets, request.prompt, request.stops, is_plain=plain, split=split)

        self._told = ToldBackend(order, min(assets.end_tokens.ids))
        self._assets, self._script = assets, script(assets)
        settings = CoreSettings(num_slots=order.num_slots, max_waiting=2**31 - 1, cache_bytes=CACHE_BYTES)
        super().__init__(self._told, ModelSide(VOCAB, NUM_LAYERS, ends), settings)

    def submit(self, request: Request) -> QueuedTicket:
        answer = self._assets.tokenizer.encode(self._script(request))
        if request.ignore_ends:
            answer *= 1 + (request.max_tokens or 0) // len(answer)
        self._told.tell(tuple(request.prompt), answer)
        return super().submit(request)


def main(descriptor: int) -> None:
    """The process. descriptor: of its end of the pair of sockets."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Path("/proc/self/comm").write_text(NAME, "ascii")
    end = socket.socket(fileno=descriptor)
    end.set_inheritable(False)
    channel = Channel(end, "answers")
    message = channel.receive()
    if message is None:
        return
    text = files()
    assets = TextAssets.of_files(text, "scripted", VOCAB)
    core = ToldCore(ScriptedOrder(**message[0]), assets)
    grammars = Grammars(lambda: text["tokenizer.json"], VOCAB, lambda: sorted(assets.end_tokens.ids))

    def recipe(grammar: Grammar, closes: tuple[str, ...]) -> MaskRecipe:
        grammars.prepare(grammar)
        return MaskRecipe(
            grammar, closes, grammars, lambda ids: assets.tokenizer.decode(list(ids), skip_special=False)
        )

    core.start()
    EngineHost(core, None, channel, recipe).serve()
    channel.finish()
