"""The stages in the order they run: each a function in a process of its own, with a time limit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.device.context import Context

LIMIT_S = 470.0
NATIVE = ("csrc", "CMakeLists.txt")
ALL = (*NATIVE, "pyproject.toml", "formats", "convert", "runtime", "scripts")
Run = Callable[[Context], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Stage:
    """function: ``module:name`` in this package. sources: a change in them makes the stage run again."""

    name: str
    function: str
    sources: tuple[str, ...]
    help: str
    limit_s: float = LIMIT_S

    def load(self) -> Run:
        """The function; imports Krasis, so only once it is built."""
        module, _, name = self.function.partition(":")
        run: Run = getattr(importlib.import_module(f"scripts.device.{module}"), name)
        return run


STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", "build:run", ALL, "build the library and the native tests, install the package"),
        Stage("native", "native:run", NATIVE, "the kernels' own tests and benchmark on the GPU"),
        Stage(
            "correctness",
            "correctness:run",
            (*ALL, "tests"),
            "pytest on the GPU: logits against transformers",
        ),
        Stage(
            "rates",
            "rates:run",
            ("scripts/device",),
            "speed of links, memories and matrix products, without Krasis",
        ),
        Stage(
            "registration",
            "registration:run",
            ("csrc", "runtime/host_memory", "scripts/device"),
            "which kinds of host memory can be pinned",
        ),
        Stage("gemm", "gemm:run", ALL, "the grouped product against dense bf16 products"),
        Stage("prefill-30b", "prefill:run_30b", ALL, "a long prompt through layers of Qwen3-30B's shape"),
        Stage("decode-30b", "decode:run_30b", ALL, "hybrid decode, layers of Qwen3-30B's shape"),
        Stage("prefill-235b", "prefill:run_235b", ALL, "a long prompt through layers of Qwen3-235B's shape"),
        Stage("decode-235b", "decode:run_235b", ALL, "hybrid decode, layers of Qwen3-235B's shape"),
        Stage("families", "families:run", ALL, "a long prompt through layers of other families' shapes"),
        Stage("kv", "kv:run", ALL, "keys and values of 16 and of 8 bits behind a long prompt"),
        Stage("serving", "serving:run", ALL, "several requests at once, layers of Qwen3-235B's shape"),
        Stage("short", "short:run", ALL, "prompts of 64 to 2,048 tokens, two ways of copying experts"),
        Stage("startup", "startup:run", ALL, "opening a bundle on disk, cold and warm"),
        Stage("ranks", "ranks:run", ALL, "the same prompt and answer on 1, 2, ... GPUs"),
    )
}
