"""What ``ranks_script.py`` computes for test_rank_states.py: a conversation whose state tokens overwrite."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from krasis.runtime.engine import Engine
from krasis.runtime.state.borders import TAIL_TOKENS

TOKENS = np.random.default_rng(5).integers(0, 320, 64).tolist()
PROMPT, SHORT, TURN = TOKENS[:40], TOKENS[40:43], TOKENS[43:60]
BORDER = len(PROMPT) - TAIL_TOKENS
EDITED = [*PROMPT[:30], *TOKENS[50:64]]


def compute(engine: Engine, folder: Path, num_ranks: int) -> dict[str, np.ndarray]:
    """A prompt, tokens that rank 0 decodes alone, turns of all ranks, an edited turn from a copy on, and a
    turn after a prefix that one rank saved."""
    found = {"prompt": engine.prefill(PROMPT, all_logits=True)}
    if num_ranks == 1:
        engine.save_prefix(folder / "1.kv")
    found["short"] = engine.prefill(SHORT, all_logits=True)
    found["decoded"] = np.stack([engine.decode(token).copy() for token in (7, 9)])
    found["turn"] = engine.prefill(TURN, all_logits=True)
    found["kept"] = np.array([engine.keep_prefix(EDITED)])
    found["edited"] = engine.prefill(EDITED[len(engine.tokens) :], all_logits=True)
    engine.load_prefix(folder / "1.kv")
    found["loaded"] = engine.prefill(SHORT, all_logits=True)
    return found
