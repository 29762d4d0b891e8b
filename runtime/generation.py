"""From logits to text: the loop that picks tokens, finds stop strings and keeps the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from krasis.runtime.drafting import DraftCount
from krasis.runtime.exclusive import CallCancelledError, Cancellation, Exclusive
from krasis.runtime.sampler import Sampler
from krasis.runtime.text.thinking import ANSWER, MarkedStream, Segment, ThinkingSplitter
from krasis.runtime.text.tokenizer import TokenStream

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds: a token, None for further text of one, and text, possibly empty.

    kind: ``answer``, or ``reasoning`` for what the model thinks first.
    """

    token: int | None
    text: str
    kind: str = ANSWER


@dataclass(slots=True)
class Generation:
    """What a generation did. Filled while it runs; times in seconds.

    num_prompt_tokens: of the whole prompt; num_cached_tokens: of these, found in the KV cache and not
    computed again.
    text: the answer. reasoning: what the model thought, apart from it. tokens: of both. drafts: the guesses
    that passes went ahead on.
    stop_reason: ``end`` (an end token), ``stop`` (a stop string), ``length`` (max_tokens), ``context`` (the
    cache is full), ``interrupted`` (the caller stopped reading, or an error ended it), ``cancelled``
    (``cancel``), and ``""`` before its first token.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_decode_steps: int = 0
    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    stop_reason: str = ""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    drafts: DraftCount = field(default_factory=DraftCount)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed in a second; 0 if none were."""
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, which comes from prefill, in a second; 0 if there were none."""
        return self.num_decode_steps / self.decode_s if self.decode_s > 0 else 0.0


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, and holds back what may be the beginning of
    one. signs: characters that only stop strings are to see: they are never shown. met: the one found."""

    __slots__ = ("_held", "_hidden", "_stops", "met")

    def __init__(self, stops: Sequence[str], signs: Iterable[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self.met = ""
        self._held = ""
        self._hidden = dict.fromkeys(map(ord, signs))

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met). The stop string itself is never shown."""
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, self.met = min(found)
            self._held = ""
            return self._shown(held[:at]), True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return self._shown(held[: len(held) - keep]), False

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _shown(self, text: str) -> str:
        return text.translate(self._hidden) if self._hidden else text


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that begins stop."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0
    )


class Answer(Iterator[Piece]):
    """The pieces of a generation as they come, and its ``stats``. Closing it, or no longer reading, stops the
    work.

    The work of a piece is done while it is asked for, and of several threads that ask each gets other pieces.
    ``close`` and ``cancel`` may be called from any thread, from a callback or a signal handler: they do not
    wait, and whoever reads sees the end; a prompt that is being computed ends after a layer.
    """

    __slots__ = ("_cancellation", "_gate", "_pieces", "stats")

    def __init__(
        self,
        pieces: Generator[Piece],
        stats: Generation,
        gate: Exclusive | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """gate: of the engine that pieces works with, which they then have for themselves. cancellation: what
        pieces looks at.
        """
        self._pieces: Generator[Piece] | None = pieces
        self._gate = gate or Exclusive()
        self._cancellation = cancellation or Cancellation()
        self.stats = stats

    def __next__(self) -> Piece:
        """Raises UsageError if the engine was closed, or another call has changed what it holds."""
        pieces = self._pieces
        if pieces is None:
            raise StopIteration
        if not self._cancellation.reason:
            try:
                return self._gate.run(self._cancellation, pieces.__next__)
            except StopIteration:
                self._pieces = None
                raise
            except CallCancelledError:
                if not self._cancellation.reason:
                    raise
        raise self._end()

    def _end(self) -> StopIteration:
        self._pieces = None
        if self._cancellation.reason == "closed":
            self._gate.check()
        self.stats.stop_reason = self._cancellation.reason
        return StopIteration()

    def close(self) -> None:
        """Ends the generation; stop_reason says ``interrupted``."""
        self._stop("interrupted")

    def cancel(self) -> None:
        """Ends the generation; stop_reason says ``cancelled``."""
        self._stop("cancelled")

    def _stop(self, reason: str) -> None:
        self._cancellation.cancel(reason)
        if self._pieces is not None and self.stats.stop_reason in ("", "interrupted"):
            self.stats.stop_reason = self._cancellation.reason


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Everything the loop needs: where logits come from and when to end.

    first: computes the prompt and gives its last token's logits, f32 [vocab]. step: feeds one token and gives
    the next logits. room: tokens the context still has after the prompt. context: all ids so far, for the
    repetition penalty. end_tokens, stop_tokens: ids that end the text. splitter: parts thinking and answer.
    """

    first: Callable[[], Logits]
    step: Callable[[int], Logits]
    context: Sequence[int]
    room: int
    sampler: Sampler
    stream: TokenStream | MarkedStream
    end_tokens: frozenset[int]
    stops: StopStrings
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    splitter: ThinkingSplitter = field(default_factory=ThinkingSplitter)


class AnswerWriter:
    """Tokens as pieces of answer and reasoning. is_stopped: a stop string was met, and all is given out."""

    __slots__ = ("_splitter", "_stops", "_stream", "is_stopped")

    def __init__(
        self, stream: TokenStream | MarkedStream, stops: StopStrings, splitter: ThinkingSplitter
    ) -> None:
        self._stream, self._stops, self._splitter = stream, stops, splitter
        self.is_stopped = False

    def push(self, token: int) -> list[Piece]:
        """What became certain with a token, which always has a piece, if an empty one."""
        text, self.is_stopped = self._stops.push(self._stream.push(token))
        pieces = self._pieces(self._splitter.push(text), token)
        return pieces + self._pieces(self._splitter.finish(), None) if self.is_stopped else pieces

    def finish(self) -> list[Piece]:
        """What was held back."""
        text, stopped = self._stops.push(self._stream.finish())
        text += "" if stopped else self._stops.finish()
        return self._pieces([*self._splitter.push(text), *self._splitter.finish()], None)

    def _pieces(self, segments: Sequence[Segment], token: int | None) -> list[Piece]:
        pieces = [Piece(None, one.text, one.kind) for one in segments]
        if token is not None:
            first = pieces[0] if pieces else Piece(None, "", self._splitter.kind)
            pieces[:1] = [Piece(token, first.text, first.kind)]
        return pieces


def run(plan: GenerationPlan, stats: Generation) -> Generator[Piece]:
    """The decode loop. The caller may stop reading at any piece; stats then say ``interrupted``."""
    begin = time.perf_counter()
    logits = plan.first()
    stats.prefill_s = time.perf_counter() - begin
    stats.stop_reason = "interrupted"
    # The last token is shown but needs no place in the cache: nothing attends to it.
    limit = min(plan.max_tokens, plan.room + 1)
    writer = AnswerWriter(plan.stream, plan.stops, plan.splitter)
    for count in range(1, limit + 1):
        token = plan.sampler.pick(logits, plan.context, stats.tokens)
        now = time.perf_counter() - begin
        if count == 1:
            stats.time_to_first_token_s = now
        stats.decode_s, stats.num_decode_steps = now - stats.time_to_first_token_s, count - 1
        if token in plan.end_tokens:
            stats.stop_reason = "end"
            break
        if token in plan.stop_tokens:
            stats.stop_reason = "stop"
            break
        stats.tokens.append(token)
        yield from _kept(writer.push(token), stats)
        if writer.is_stopped:
            stats.stop_reason = "stop"
            return
        if count < limit:
            logits = plan.step(token)
    else:
        stats.stop_reason = "length" if limit == plan.max_tokens else "context"
    yield from _kept(writer.finish(), stats)


def _kept(pieces: Sequence[Piece], stats: Generation) -> Iterator[Piece]:
    """The pieces, each noted in stats as it is given out."""
    for piece in pieces:
        if piece.kind == ANSWER:
            stats.text += piece.text
        else:
            stats.reasoning += piece.text
        yield piece
