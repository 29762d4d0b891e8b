"""The tokens whose keys and values a backend's cache holds, and what is computed after them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.models.state import fixed_bytes
from krasis.runtime.backend import Backend, Logits
from krasis.runtime.batch import one_sequence
from krasis.runtime.drafting import Ahead, DraftCount, Drafter
from krasis.runtime.exclusive import Cancellation, Exclusive
from krasis.runtime.layer_progress import Progress, layer_progress
from krasis.runtime.settings import EngineSettings
from krasis.runtime.state.borders import pieces
from krasis.runtime.state.kv_file import PrefixFile, save_prefix
from krasis.runtime.text.token_ids import checked_ids
from krasis.runtime.wider_cache import is_number, widened

logger = logging.getLogger(__name__)


class HeldTokens:
    """One sequence of a backend: slot 0, the only one that an engine uses. Engines call it inside their gate,
    whose ``num_changes`` it counts up.

    tokens: the ids computed so far. backend and settings: those in use, which are others once an F16 cache
    has overflowed; reopen: opens a backend with other settings, None where that cannot be.
    """

    def __init__(self, bundle: Bundle, backend: Backend, settings: EngineSettings, gate: Exclusive) -> None:
        self.backend, self.settings = backend, settings
        self.reopen: Callable[[EngineSettings], Backend] | None = None
        self.tokens: list[int] = []
        self._bundle, self._gate, self._ahead = bundle, gate, Ahead()
        self._vocab_size = bundle.spec.vocab
        self._snapshots = fixed_bytes(bundle.spec) > 0  # of what each token overwrites: prompts are cut
        backend.state.open()

    def prefill(
        self, tokens: Sequence[int], cancellation: Cancellation, all_logits: bool, progress: Progress | None
    ) -> Logits:
        """As ``Engine.prefill``: logits [vocab] of the last, or [len(tokens), vocab] of all; a copy."""
        ids = self._checked(tokens)
        self._settle()
        chunks: list[Logits] = []
        last: Logits | None = None
        most = self.backend.prefill_chunk
        if self.tokens:
            self.backend.state.checkpoint(0)
        try:
            # Some backends copy what tokens overwrite inside a pass; more passes would read experts again.
            cuts = self._snapshots and not getattr(self.backend.state, "copies_inside", False)
            for begin, end in pieces(len(ids), most, snapshots=cuts):
                cancellation.check()
                chunk = ids[begin:end]
                self.backend.layer_done = layer_progress(cancellation, progress, begin, len(chunk), len(ids))
                last = self._run(chunk, all_logits)
                if not is_number(last[-1]) and self._widen():
                    last = self._run(chunk, all_logits)
                self._gate.num_changes += 1
                self.tokens.extend(chunk.tolist())
                if end < len(ids) if self._snapshots else end == len(ids):
                    self.backend.state.checkpoint(0)  # of the end, if windows alone are overwritten
                if all_logits:
                    chunks.append(last.copy())
                if progress is not None:
                    progress(begin + len(chunk), len(ids))
        finally:
            self.backend.layer_done = None
        return np.concatenate(chunks) if all_logits else cast("Logits", last)[-1].copy()

    def decode(self, token: int) -> Logits:
        """As ``Engine.decode``: logits [vocab], as a view that the next call overwrites."""
        position = len(self.tokens)
        if position >= self.backend.capacity or type(token) is not int or not 0 <= token < self._vocab_size:
            token = self._checked_one(token)
        logits = self._ahead.take(token)
        if logits is None:
            logits = self._computed(token)
        self._gate.num_changes += 1
        self.tokens.append(token)
        return logits

    def _computed(self, token: int) -> Logits:
        """Logits [vocab] of a pass, which also computes what is guessed to follow."""
        drafter, guesses = self._drafter, list[int]()
        if drafter is not None:
            room = self.backend.capacity - len(self.tokens) - 1
            guesses = drafter.propose(self.tokens, token, min(drafter.count, room))
        rows = self._run(np.array([token, *guesses], np.int64), bool(guesses), cuts=bool(guesses))
        if not is_number(rows[0]) and self._widen():
            return cast("Logits", self._run(np.array([token], np.int64))[0])
        if guesses:
            self._ahead.fill(guesses, rows[1:])
        return cast("Logits", rows[0])

    @property
    def _drafter(self) -> Drafter | None:
        return getattr(self.backend, "drafter", None)

    def count_drafts(self) -> DraftCount:
        """A count of the guesses from now on."""
        self._ahead.count = DraftCount()
        return self._ahead.count

    def _settle(self) -> None:
        """Takes the state back to the tokens held, where a pass went further on guesses."""
        self._ahead.clear()
        state, held = self.backend.state, len(self.tokens)
        if self._drafter is not None and state.length(0) > held:
            state.rewind(0, state.restorable(0, held))

    def _run(self, tokens: npt.NDArray[np.int64], all_logits: bool = False, *, cuts: bool = False) -> Logits:
        """Computes tokens after those held."""
        self._mend()
        logits: Logits = self.backend.run(
            one_sequence(tokens, len(self.tokens), "all" if all_logits else "last", cuts=cuts)
        )
        return logits

    def _mend(self) -> None:
        """Computes again, of the tokens held, what a pass that broke off has spoilt."""
        held, state = len(self.tokens), self.backend.state
        if (kept := state.restorable(0, held)) < held:
            state.rewind(0, kept)
            for begin in range(kept, held, self.backend.prefill_chunk):
                again = np.array(self.tokens[begin : begin + self.backend.prefill_chunk], np.int64)
                self.backend.run(one_sequence(again, begin, "none"))

    def truncate(self, num_tokens: int) -> None:
        """As ``Engine.truncate``."""
        if not 0 <= num_tokens <= len(self.tokens):
            raise UsageError("cannot keep more tokens than are held", got=num_tokens, limit=len(self.tokens))
        if num_tokens < len(self.tokens):
            self._settle()
            self._gate.num_changes += 1
            kept = self.backend.state.restorable(0, num_tokens)
            self.backend.state.rewind(0, kept)
            del self.tokens[kept:]

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """As ``Engine.keep_prefix``."""
        count = 0
        limit = min(len(self.tokens), len(tokens) - 1)
        while count < limit and self.tokens[count] == tokens[count]:
            count += 1
        self.truncate(max(count, 0))
        return len(self.tokens)

    def save_prefix(self, path: str | Path, conversation: bytes) -> None:
        """As ``Engine.save_prefix``."""
        self._settle()
        self._mend()
        save_prefix(path, self._bundle, self.backend, self.tokens, conversation=conversation)

    def load_prefix(self, path: str | Path) -> bytes:
        """As ``Engine.load_prefix``."""
        with PrefixFile(path) as file:
            file.check(self._bundle, self.backend)
            file.verify()
            tokens, conversation = file.tokens(self._bundle.spec), file.conversation()
            # From here on the cache is being overwritten: a failure to read must not leave old ids on new
            # keys.
            self._gate.num_changes += 1
            self.tokens.clear()
            self._ahead.clear()
            if self._drafter is not None:
                self._drafter.forget()
            file.restore(self.backend)
            self.tokens.extend(tokens)
            logger.info("restored %d tokens from %s (computed by: %s)", len(tokens), path, file.computed_by)
        return conversation

    def _widen(self) -> bool:
        """Goes on with an F32 cache in place of an F16 one that overflowed. False if that cannot be."""
        found = self.reopen and widened(self.backend, self.settings, self.reopen, self.tokens)
        if not found:
            return False
        self.backend.close()
        self.backend, self.settings = found
        return True

    def _checked(self, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = checked_ids(tokens, self._vocab_size)
        if not ids.size or len(self.tokens) + ids.size > self.backend.capacity:
            self.refuse_length(ids.size, len(self.tokens))
        return ids

    def _checked_one(self, token: int) -> int:
        return int(self._checked([token])[0])

    def refuse_length(self, count: int, held: int) -> NoReturn:
        """Raises UsageError about a prompt of so many tokens after so many that are held."""
        if not count:
            raise UsageError("the prompt is empty")
        raise UsageError(
            "the context is full",
            got=f"{count} tokens" + (f" after {held}" if held else ""),
            limit=f"{self.backend.capacity} tokens",
            hint="shorten the prompt, or open with a larger context (--ctx)",
        )
