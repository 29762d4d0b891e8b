"""Tries hostile templates and tokenizers as krasis-run would use them, and measures what each takes."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import KrasisError
from krasis.runtime.text.chat import ChatTemplate, Message
from krasis.runtime.text.sandbox import shared_sandbox
from krasis.runtime.text.tokenizer import Tokenizer

TURNS = [Message("system", "Be brief."), Message("user", "def main(): return 'aaaa the quick brown fox'")]
TEXTS = (
    "<|im_start|>user\ndef main(args): return the quick brown fox\n    for i in range(10): pass<|im_end|>\n",
    "a" * 4000,
    "the rain in spain " * 100 + "é🙂\0\u202e",
    "",
)
_PAGE_BYTES = resource.getpagesize()


@dataclass(frozen=True)
class Trial:
    """What became of a file.

    sentence: the refusal, empty if it did all that was asked. seconds: by the clock; cpu_seconds: of this
    process and the worker. extra_bytes: resident memory of both beyond what they had.
    """

    name: str
    sentence: str
    seconds: float
    cpu_seconds: float
    extra_bytes: int


def try_template(name: str, source: str) -> Trial:
    """Compiles it and renders twice: the second time in what the first left."""

    def use() -> None:
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        template.render(TURNS)
        template.render(TURNS[1:])

    return _measured(name, use)


def try_tokenizer(name: str, data: bytes) -> Trial:
    """Loads it, encodes some texts and decodes the ids, at once and one by one."""

    def use() -> None:
        tokenizer = Tokenizer(data, 1 << 20)
        for text in TEXTS:
            ids = tokenizer.encode(text, special=True)
            tokenizer.decode(ids[:200])
            stream = tokenizer.stream()
            for token in ids[:20]:
                stream.push(token)
            stream.finish()
        tokenizer.token_id("<|im_end|>")

    return _measured(name, use)


def _measured(name: str, use: Callable[[], None]) -> Trial:
    sandbox = shared_sandbox()
    sandbox.start()
    ChatTemplate("ready", {})  # so that the worker has imported what it needs
    usage = _Usage()
    begin = time.perf_counter()
    sentence = ""
    try:
        use()
    except KrasisError as error:
        sentence = str(error)
    seconds = time.perf_counter() - begin
    return Trial(name, sentence, seconds, *usage.stop())


class _Usage(threading.Thread):
    """Looks every 4 ms at the resident memory and the CPU time of this process and of the worker."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()
        self._ticks: dict[str, tuple[int, int]] = {}  # by process: first seen, last seen
        self._before = self._peak = self._look()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(0.004):
            self._peak = max(self._peak, self._look())

    def stop(self) -> tuple[float, int]:
        """Seconds and bytes."""
        self._stopped.set()
        self.join()
        self._look()
        ticks = sum(last - first for first, last in self._ticks.values())
        return ticks / os.sysconf("SC_CLK_TCK"), max(0, self._peak - self._before)

    def _look(self) -> int:
        """Bytes now."""
        total = 0
        for pid in ("self", str(shared_sandbox().worker_pid)):
            with contextlib.suppress(OSError, IndexError):
                total += int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * _PAGE_BYTES
                user, system = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[11:13]
                now = int(user) + int(system)
                self._ticks[pid] = (self._ticks.get(pid, (now, now))[0], now)
        return total
