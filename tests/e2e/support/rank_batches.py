"""What ``ranks_script.py`` computes for test_rank_batches.py: sequences in one call, and each alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from krasis.runtime.backend import Backend
from krasis.runtime.batch import Batch, batch_of
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu import exchange
from krasis.runtime.planning import sums

SLOTS = 5
LENGTHS = (3, 5, 2, 9, 14)
PROMPTS = tuple([(7 * slot + 3 * at + at * at) % 64 for at in range(n)] for slot, n in enumerate(LENGTHS))
TURNS = ((2, [50, 51, 52]), (3, [5, 6, 7, 8]), (4, [33, 34]))  # slot, tokens
NEW_PROMPT = [9, 8, 7, 6, 5, 4, 3]
FOLLOWING = (11, 13)  # what every sequence is given after its prompt, a token a call


class CancelledError(Exception):
    """Raised between two layers."""


def together(backend: Backend) -> dict[str, np.ndarray]:
    """Every sequence goes its own way, all in the same calls."""
    state, found = backend.state, {}
    for _ in range(SLOTS - 1):  # the engine has opened the first
        state.open()
    cancel_a_pass(backend)
    rows = backend.run(batch_of([(slot, 0, prompt, "last") for slot, prompt in enumerate(PROMPTS)]))
    found |= {f"prompt_{slot}": row.copy() for slot, row in enumerate(rows)}
    for step, token in enumerate(FOLLOWING):
        ends = [n + step for n in LENGTHS]
        rows = backend.run(batch_of([(slot, end, [token], "last") for slot, end in enumerate(ends)]))
        found |= {f"token_{step}_{slot}": row.copy() for slot, row in enumerate(rows)}
    # Turns of three, a new prompt in a slot that was given up, and a single token, which is no prompt.
    state.close(1)
    assert state.open() == 1
    parts = [(1, 0, NEW_PROMPT, "all"), (0, LENGTHS[0] + 2, [21], "last")]
    parts += [(slot, LENGTHS[slot] + 2, turn, "all") for slot, turn in TURNS]
    rows = backend.run(batch_of(parts)).copy()
    found["new"], found["mixed"], rows = rows[:7], rows[7], rows[8:]
    for slot, turn in TURNS:
        found[f"turn_{slot}"], rows = rows[: len(turn)], rows[len(turn) :]
    copy_slot(backend, 4, 1)
    state.rewind(3, 6)  # an edited turn
    end = state.length(4)
    parts = [(1, end, [1, 2, 3], "all"), (3, 6, [40, 41], "none"), (4, end, [1, 2, 3], "last")]
    found["copied"] = backend.run(batch_of(parts)).copy()
    edited = batch_of([(3, 8, [42, 43, 44], "all"), (0, LENGTHS[0] + 3, [22, 23], "none")])
    found["edited"], found["between"] = with_token_between(backend, edited, batch_of([(2, 7, [17], "last")]))
    found["lengths"] = np.array([state.length(slot) for slot in range(SLOTS)])
    return found


def with_token_between(backend: Backend, batch: Batch, token: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The batch, and between two of its layers the token; behind it where the backend cannot."""
    rows: list[np.ndarray] = []

    def decode(done: int, num_layers: int) -> None:
        if not rows:
            assert done < num_layers
            backend.layer_done = None
            rows.append(backend.run(token)[0].copy())
            backend.layer_done = decode

    backend.layer_done = decode if backend.decodes_between_layers else None
    logits = backend.run(batch).copy()
    backend.layer_done = None
    return logits, rows[0] if rows else backend.run(token)[0].copy()


def cancel_a_pass(backend: Backend) -> None:
    """What the ranks have begun they end; then all are ready for the next."""

    def cancel(done: int, num_layers: int) -> None:
        raise CancelledError

    backend.layer_done = cancel
    try:
        backend.run(batch_of([(slot, 0, [60, 61, 62, slot], "last") for slot in (1, 3)]))
    except CancelledError:
        return
    finally:
        backend.layer_done = None
    raise AssertionError("not cancelled")


def lack_memory(rank: int, num_ranks: int) -> None:
    """From now on this rank's doubles find no memory for some launches: of one rank, then of another, then of
    both, then of a third, each in a pass of its own; in layers, in exchanges, for the logits. And no pass is
    short enough for sums of 32 bits."""
    sums.LATENCY_BYTES, sums.EXPERT_SHARE = 0, 2**60
    if num_ranks == 1:
        return
    refused = {
        num_ranks - 1: {("share_kv", 2), ("gather_tokens", 15)},
        0: {("scatter_sum", 3), ("gather_tokens", 12)},
        1: {("gather_ids", 7)},
    }.get(rank, set())
    counts: Counter[str] = Counter()

    def refuse(name: str) -> bool:
        counts[name] += 1
        return (name, counts[name]) in refused

    make = DeviceDouble.__init__

    def make_refusing(self: DeviceDouble, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.refuse = refuse

    DeviceDouble.__init__ = make_refusing


def out_of_memory(backend: Backend) -> dict[str, np.ndarray]:
    """Two prompts of 20 tokens together, and then each alone."""
    backend.state.open()
    prompts = [[(5 * at + at * at) % 64 for at in range(12)], [(3 * at + 1) % 64 for at in range(8)]]
    chunks = [backend.prefill_chunk]
    together = backend.run(batch_of([(slot, 0, prompt, "all") for slot, prompt in enumerate(prompts)]))
    chunks.append(backend.prefill_chunk)
    alone = [backend.run(batch_of([(0, 0, prompt, "all")])).copy() for prompt in prompts]
    executed = getattr(backend, "_inner", backend)._device._schedule.executed
    beside = [label for label in executed if label.endswith("on stream exchange")]
    exchange.BESIDE_BYTES = 2**60
    behind = backend.run(batch_of([(0, 0, prompts[1], "all")])).copy()
    return {
        "together": together, "alone": np.concatenate(alone), "behind": behind,
        "chunks": np.array(chunks), "beside": np.array(len(beside)),
    }  # fmt: skip


def copy_slot(backend: Backend, source: int, target: int) -> None:
    """As the server does with a prefix that two prompts share."""
    length = backend.state.length(source)
    for layer in range(len(backend.spec.layers)):
        backend.state.import_(target, layer, *backend.state.export(source, layer, length))


def one_by_one(backend: Backend) -> dict[str, np.ndarray]:
    """The same results, each sequence without company and in a slot that another one had before."""
    found = {}

    def run(start: int, tokens: list[int], logits: str = "last") -> np.ndarray:
        return backend.run(batch_of([(2, start, tokens, logits)])).copy()

    def begin(slot: int) -> int:
        backend.state.rewind(2, 0)
        found[f"prompt_{slot}"] = run(0, PROMPTS[slot])[0]
        for step, token in enumerate(FOLLOWING):
            found[f"token_{step}_{slot}"] = run(LENGTHS[slot] + step, [token])[0]
        return LENGTHS[slot] + len(FOLLOWING)

    for slot, turn in ((0, []), (1, []), *TURNS):
        end = begin(slot)
        if slot == 0:
            found["mixed"] = run(end, [21])[0]
        if turn:
            found[f"turn_{slot}"] = run(end, turn, "all")
        if slot == 2:
            found["between"] = run(end + len(turn), [17])[0]
        if slot == 3:
            backend.state.rewind(2, 6)
            run(6, [40, 41], "none")
            found["edited"] = run(8, [42, 43, 44], "all")
        if slot == 4:
            rows = run(end + len(turn), [1, 2, 3], "all")
            found["copied"] = np.concatenate([rows, rows[-1:]])
    backend.state.rewind(2, 0)
    found["new"] = run(0, NEW_PROMPT, "all")
    return found


def compute(backend: Backend) -> dict[str, np.ndarray]:
    """Both; the second as NAME_alone."""
    found = together(backend)
    return found | {f"{name}_alone": logits for name, logits in one_by_one(backend).items()}
