"""What ``ranks_script.py`` computes for test_rank_decode.py: tokens of a few sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
from rank_batches import with_token_between

from krasis.runtime.batch import batch_of

SLOTS = 3
PROMPTS = ([3, 9, 27], [5, 25], [7, 49, 23, 33])
NUM_ALONE = 5  # tokens of one sequence
NOTE_TOKENS = 2  # after so many residency looks at what was chosen


def compute(backend: Any) -> dict[str, np.ndarray]:
    """Prompts, tokens of one sequence and of all three, a turn with a token between its layers, more tokens.
    counts [calls, 2]: experts that the CPU and that all GPUs computed."""
    state, found, counts = backend.state, {}, []
    inner = getattr(backend, "_inner", backend)

    def decode(name: str, *rows: tuple[int, int]) -> None:
        logits = backend.run(batch_of([(slot, state.length(slot), [token], "last") for slot, token in rows]))
        split = inner.last_decode_split
        counts.append((split["num_cpu_experts"], split["num_gpu_experts"]))
        found[name] = logits.copy()

    for _ in range(SLOTS - 1):
        state.open()
    backend.run(batch_of([(slot, 0, prompt, "last") for slot, prompt in enumerate(PROMPTS)]))
    for step in range(NUM_ALONE):
        decode(f"one_{step}", (0, 11 + step))
    decode("three", (0, 8), (1, 9), (2, 10))
    turn = batch_of([(1, state.length(1), [50, 51, 52], "all")])
    token = batch_of([(2, state.length(2), [44], "last")])
    found["turn"], found["between"] = with_token_between(backend, turn, token)
    decode("two", (2, 31), (1, 32))
    decode("last", (1, 33))
    found["counts"] = np.array(counts)
    found["placement"] = np.array(backend.placement)
    return found
