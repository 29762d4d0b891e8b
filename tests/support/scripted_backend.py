"""A backend without a model: it "samples" what a script says, in a given time, and notes what was asked.

Its state is real, if small: a layer's keys are the tokens themselves. What comes next is read from it, so
that a state which was copied, cut or restored wrongly gives other answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.batch import Batch

Script = Callable[[tuple[int, ...]], int]
NUM_LAYERS = 2


def mixed(vocab: int) -> Script:
    """Each token follows from all before it."""

    def following(tokens: tuple[int, ...]) -> int:
        return hash(tokens) % vocab  # of numbers: the same in every process

    return following


def told(answers: dict[tuple[int, ...], Sequence[int]], otherwise: int = 0) -> Script:
    """The answers to prompts; behind an answer, and for other prompts, one token again and again."""

    def following(tokens: tuple[int, ...]) -> int:
        for prompt, answer in answers.items():
            at = len(tokens) - len(prompt)
            if (
                tokens[: len(prompt)] == prompt
                and list(tokens[len(prompt) :]) == list(answer[:at])
                and at < len(answer)
            ):
                return answer[at]
        return otherwise

    return following


class ArrayState:
    """A ``StateStore`` of arrays. checkpoints: positions are restorable only where a batch ended (else:
    all)."""

    dtype = "f32"

    def __init__(self, num_slots: int, capacity: int, *, checkpoints: bool = False) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.checkpoints = checkpoints
        self.tokens: dict[int, list[int]] = {}
        self.marks: dict[int, set[int]] = {}
        self.num_opened = 0

    def open(self) -> int:
        free = [slot for slot in range(self.num_slots) if slot not in self.tokens]
        if not free:
            raise ResourceError("there is no free slot")
        self.tokens[free[0]], self.marks[free[0]] = [], {0}
        self.num_opened += 1
        return free[0]

    def close(self, slot: int) -> None:
        del self.tokens[slot]

    def length(self, slot: int) -> int:
        return len(self.tokens[slot])

    def restorable(self, slot: int, position: int) -> int:
        position = min(position, len(self.tokens[slot]))
        if not self.checkpoints or position == len(self.tokens[slot]):
            return position
        return max(mark for mark in self.marks[slot] if mark <= position)

    def rewind(self, slot: int, position: int) -> None:
        if self.restorable(slot, position) != position:
            raise NativeError("this position cannot be restored", got=position)
        del self.tokens[slot][position:]
        self.marks[slot] = {mark for mark in self.marks[slot] if mark <= position}

    def checkpoint(self, slot: int) -> None:
        self.marks[slot].add(len(self.tokens[slot]))

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        keys = np.array(self.tokens[slot][:num_tokens], dtype=np.float32).reshape(1, num_tokens, 1)
        return keys, keys + layer

    def import_(self, slot: int, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        if not np.array_equal(keys + layer, values):
            raise NativeError("values of another layer")
        self.tokens[slot] = keys.reshape(-1).astype(int).tolist()
        self.marks[slot] = {0, len(self.tokens[slot])}

    def append(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        held = self.tokens[slot]
        if start > len(held):
            raise NativeError("a span begins behind the end of its slot", got=start, limit=len(held))
        if start < len(held):
            self.rewind(slot, start)
        held.extend(tokens)
        if len(held) > self.capacity:
            raise NativeError("a slot is too small", got=len(held), limit=self.capacity)


class ScriptedBackend:
    """See ``backend.Backend``. batches: every batch asked for. pass_s, token_s: how long a batch with a span
    of several rows, or one of single rows, takes. before: called with each batch, and may raise or wait.
    """

    description, kv_dtype, placement = "scripted", "f32", ("nowhere", "nowhere")

    def __init__(
        self,
        script: Script | None = None,
        *,
        vocab: int = 64,
        num_slots: int = 4,
        capacity: int = 4096,
        prefill_chunk: int = 4096,
        pass_s: float = 0.0,
        token_s: float = 0.0,
        checkpoints: bool = False,
    ) -> None:
        self.vocab, self.capacity, self.prefill_chunk = vocab, capacity, prefill_chunk
        self.script = script or mixed(vocab)
        self.state = ArrayState(num_slots, capacity, checkpoints=checkpoints)
        self.pass_s, self.token_s = pass_s, token_s
        self.layer_done: Callable[[int, int], None] | None = None
        self.before: Callable[[Batch], None] = lambda batch: None
        self.batches: list[Batch] = []
        self.is_closed = False

    @property
    def passes(self) -> list[Batch]:
        """The batches that have a span of several rows."""
        return [batch for batch in self.batches if any(span.rows > 1 for span in batch.spans)]

    def run(self, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        is_pass = any(span.rows > 1 for span in batch.spans)
        self.before(batch)
        for layer in range(NUM_LAYERS):
            if pause := (self.pass_s if is_pass else self.token_s):
                time.sleep(pause / NUM_LAYERS)
            if self.layer_done is not None:
                self.layer_done(layer + 1, NUM_LAYERS)
        rows = []
        for span in batch.spans:
            tokens = batch.tokens[span.first_row : span.end_row].tolist()
            self.state.append(span.slot, span.start, tokens)
            held = self.state.tokens[span.slot]
            rows += [tuple(held[: span.end - back]) for back in reversed(range(span.num_logits))]
        logits = np.zeros((len(rows), self.vocab), dtype=np.float32)
        for row, tokens in enumerate(rows):
            logits[row] = self.scores(tokens)
        return logits

    def scores(self, tokens: tuple[int, ...]) -> np.ndarray:
        """What may come next, [vocab]: the script's token first."""
        return -np.abs(np.arange(self.vocab) - self.script(tokens))

    def close(self) -> None:
        self.is_closed = True
