"""Short and middle prompts, no expert in VRAM: all experts are copied, or those that were chosen.

Random routers choose so evenly that from some hundred tokens on there is nothing to save: then the second
way must not take longer. Prompts of a few different tokens choose fewer experts, as real prompts do.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine
from krasis.runtime.gpu.backend import GpuBackend
from krasis.runtime.gpu.experts.paths import PathChoice, PathModel
from krasis.runtime.planning.types import ExpertPath
from scripts.device import places
from scripts.device.context import Context
from scripts.device.devices import open_engine
from scripts.device.limits import streaming_vram_bytes
from scripts.device.prefill import last_prefill, prefill_s

LABEL = "235b"
NUM_TOKENS = {"real": (64, 128, 512, 1024, 2048), "tiny": (3,)}
KINDS = {"even": 0, "uneven": 4}  # different tokens in a prompt; 0: all
WAYS: tuple[ExpertPath, ...] = ("streamed", "routed")

Record = dict[str, Any]


class OneWay:
    """In the place of a backend's cost model: always the same way."""

    def __init__(self, usual: PathModel, path: ExpertPath) -> None:
        self._usual, self._path = usual, path

    def choose(self, *arguments: Any) -> PathChoice:
        """The way; what all are expected to take."""
        return PathChoice(self._path, self._usual.choose(*arguments).expected_s)

    def num_ahead(self, num_tokens: int, start: int) -> int:
        """As usual."""
        return self._usual.num_ahead(num_tokens, start)


def run(context: Context) -> Record:
    """See the module."""
    path, made = places.bundle_in_ram(context, LABEL)
    counts = NUM_TOKENS[context.size]
    with Bundle.open(path) as bundle:
        vram_bytes = streaming_vram_bytes(bundle, max(counts), context.device)
    with ExitStack() as closing:
        engine = closing.enter_context(open_engine(context, path, max(counts), vram_bytes=vram_bytes))
        backend = engine._backend
        if not isinstance(backend, GpuBackend):
            raise TypeError(f"not on a GPU: {backend.description}")
        prefill_s(engine, prompt(engine, max(counts), 0))  # waits for what is loaded in the background
        rows = [measure(context, engine, backend, kind, count) for kind in KINDS for count in counts]
    return {**made, "description": backend.description, "rows": rows}


def prompt(engine: Engine, num_tokens: int, num_different: int) -> np.ndarray[Any, Any]:
    """Random ids. num_different: of so many; 0: of all."""
    random = np.random.default_rng(num_tokens)
    vocab = engine.architecture.vocab_size
    if not num_different:
        return random.integers(0, vocab, num_tokens)
    return random.choice(random.integers(0, vocab, num_different), num_tokens)


def measure(context: Context, engine: Engine, backend: GpuBackend, kind: str, num_tokens: int) -> Record:
    """A prompt each way: seconds, GB copied, and what the usual choice would be."""
    usual, streamed = backend._paths, backend._live_parts().streamed
    ids = prompt(engine, num_tokens, KINDS[kind])
    found: Record = {"kind": kind, "num_tokens": num_tokens}
    for way in WAYS:
        backend._paths = OneWay(usual, way)  # type: ignore[assignment]
        before = ahead_of(streamed)
        prefill_s(engine, ids)
        seconds = [prefill_s(engine, ids) for _ in range(context.sizes.repeats)]
        last = last_prefill(engine)
        copied, used = (now - then for now, then in zip(ahead_of(streamed), before, strict=True))
        found[way] = {
            "median_s": statistics.median(seconds),
            "best_s": min(seconds),
            "bytes_copied": last["bytes_copied"],
            "num_ahead": streamed.num_ahead if way == "routed" else 0,
            "ahead_used": used / copied if copied else 0.0,
        }
    backend._paths = usual
    choice = usual.choose(num_tokens, 0, backend.num_resident_experts, WAYS, streamed.num_copied(num_tokens))
    return {**found, "chosen": choice.path, "expected_s": choice.expected_s}


def ahead_of(streamed: Any) -> tuple[int, int]:
    """Experts copied ahead so far, and of these chosen."""
    return streamed.ahead.num_copied, streamed.ahead.num_used
