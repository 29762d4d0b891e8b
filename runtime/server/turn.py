"""One answer as it comes from the engine's core, in the steps that the APIs write down each in its way."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from krasis.runtime.server.errors import ApiError, from_krasis, shutting_down, too_long
from krasis.runtime.server.thought_form import ThoughtForm
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.server.tools.splitter import CallSplitter, Part
from krasis.runtime.serving.api import (
    ContextTooLongError,
    CoreClosedError,
    Delta,
    Event,
    Failed,
    Finished,
    Progress,
    PromptScores,
    Score,
    Ticket,
)

if TYPE_CHECKING:
    from krasis.runtime.server.ask import Ask
    from krasis.runtime.server.metrics import Metrics

logger = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's text, its bytes and log probability, and those of the likeliest tokens in its place; the ids
    of all."""

    text: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()
    token: int = -1
    top_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """Of tokens of the answer."""

    tokens: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Picked:
    """Ids of tokens of the answer. Only for those who ask for them."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Of the prompt's tokens; None for the first."""

    tokens: tuple[TokenScore | None, ...]


@dataclass(frozen=True, slots=True)
class Making:
    """How far the prompt is."""

    progress: Progress

    def llama_cpp(self) -> dict[str, Any]:
        """As llama.cpp's page reads it."""
        one = self.progress
        return {
            "total": one.num_total,
            "cache": one.num_cached,
            "processed": one.num_processed,
            "time_ms": round(1e3 * one.elapsed_s),
        }


@dataclass(frozen=True, slots=True)
class End:
    """The answer's end. reason: ``end``, ``stop`` or ``length``. stop_text: the stop text that was met.
    is_full: it ended because the context is full. num_drafted_tokens, num_accepted_tokens: guessed ahead, and
    of these the right ones."""

    reason: str
    stop_text: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_reasoning_tokens: int
    prefill_s: float
    decode_s: float
    is_full: bool = False
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


Step = Picked | Text | Call | Scores | PromptScored | Making | End


class Turn:
    """A request that the core has taken on. One reader; ``close`` ends it, whoever calls and however often.

    token_text: a token's text. closing: set when the server ends.
    """

    def __init__(
        self,
        ask: Ask,
        ticket: Ticket,
        *,
        replay: Replay,
        token_text: Callable[[int], str],
        closing: asyncio.Event,
        metrics: Metrics,
        on_close: Callable[[], None],
    ) -> None:
        self.ask = ask
        self._ticket, self._replay, self._closing, self._metrics = ticket, replay, closing, metrics
        self._token_text, self._on_close = token_text, on_close
        self._calls = CallSplitter(ask.call_format, ask.choice.tools)
        self._thoughts = ThoughtForm(ask.thought_form)
        self._begun = time.perf_counter()
        self._first = self._last = 0.0
        self._num_cached = self._num_generated = 0
        self._ended = self._closed = False

    async def steps(self) -> AsyncGenerator[Step]:
        """The steps, up to and with ``End``. Raises ApiError for an answer that an error ended."""
        async with aclosing(self._events()) as events:
            async for step in self._read(events):
                yield step

    async def _read(self, events: AsyncIterator[Event]) -> AsyncIterator[Step]:
        async for event in events:
            if isinstance(event, Delta):
                self._note_delta(event)
                if self.ask.wants_tokens and event.tokens:
                    yield Picked(event.tokens)
                if event.scores and event.kind == "answer":
                    yield Scores(tuple(self._scored(one) for one in event.scores))
                for part in self._calls.push(event.kind, event.text):
                    for one in self._thoughts.push(part):
                        yield one
            elif isinstance(event, Progress):
                self._num_cached = event.num_cached
                yield Making(event)
            elif isinstance(event, PromptScores):
                yield PromptScored(tuple(None if one is None else self._scored(one) for one in event.scores))
            elif isinstance(event, Finished):
                for part in self._finish(event):
                    for one in self._thoughts.push(part):
                        yield one
                yield self._end(event)
                return
            else:
                raise self._failure(event)
        raise shutting_down()

    async def _events(self) -> AsyncGenerator[Event]:
        """The core's events; none more once the server is closing."""
        events: Any = self._ticket.async_events()
        closing = asyncio.ensure_future(self._closing.wait())
        following: asyncio.Future[Event] | None = None
        try:
            while not closing.done():
                following = asyncio.ensure_future(anext(events))
                await asyncio.wait({following, closing}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                try:
                    event = following.result()
                except StopAsyncIteration:
                    return
                yield event
        finally:
            for task in (closing, following):
                if task is not None and not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, StopAsyncIteration):
                        await task
            await events.aclose()

    def _finish(self, event: Finished) -> list[Part]:
        return self._calls.finish(truncated=event.reason in ("length", "context", "cancelled"))

    def _end(self, event: Finished) -> End:
        self._ended = True
        reason = {"context": "length", "cancelled": "length"}.get(event.reason, event.reason)
        usage, times = event.usage, event.timings
        self._metrics.finished(
            reason, usage.num_prompt, usage.num_generated, time.perf_counter() - self._begun
        )
        self._log(reason, usage.num_prompt, usage.num_cached, usage.num_generated)
        return End(
            reason=reason,
            stop_text=event.stop if event.reason == "stop" else None,
            num_prompt_tokens=usage.num_prompt,
            num_cached_tokens=usage.num_cached,
            num_generated_tokens=usage.num_generated,
            num_reasoning_tokens=usage.num_reasoning,
            prefill_s=times.prefill_s,
            decode_s=times.decode_s,
            is_full=event.reason == "context",
            num_drafted_tokens=usage.num_drafted,
            num_accepted_tokens=usage.num_accepted,
        )

    def _failure(self, event: Failed) -> ApiError:
        self._ended = True
        usage = event.usage
        seconds = time.perf_counter() - self._begun
        self._metrics.finished("error", usage.num_prompt, usage.num_generated, seconds)
        self._log(f"failed: {event.error}", usage.num_prompt, usage.num_cached, usage.num_generated)
        return of_core(event.error)

    def _note_delta(self, event: Delta) -> None:
        now = time.perf_counter()
        if self._last:
            self._metrics.between_tokens(now - self._last)
        else:
            self._metrics.first_token(now - self._begun)
            self._first = now
        self._last = now
        self._num_generated += len(event.tokens)

    def so_far(self) -> End:
        """The figures that the answer would have if it ended now."""
        return End(
            reason="length",
            stop_text=None,
            num_prompt_tokens=len(self.ask.prompt),
            num_cached_tokens=self._num_cached,
            num_generated_tokens=self._num_generated,
            num_reasoning_tokens=0,
            prefill_s=max(self._first - self._begun, 0.0),
            decode_s=self._last - self._first,
        )

    def _scored(self, score: Score) -> TokenScore:
        text = self._token_text(score.token)
        top = tuple(
            (word := self._token_text(one), word.encode(), _finite(value)) for one, value in score.top
        )
        ids = tuple(one for one, _ in score.top)
        return TokenScore(text, text.encode(), _finite(score.logprob), top, score.token, ids)

    def remember(self, call: Call, prefix: str = "call_") -> str:
        """The call's id, by which the client's next request can name it."""
        return self._replay.remember(call, prefix)

    def arguments(self, call: Call) -> Any:
        """The arguments as an object."""
        return json.loads(call.arguments)

    def log_failure(self) -> None:
        """Writes the exception that is being handled to the log."""
        logger.exception("%s: failed while its answer was written", self._ticket.id)

    def close(self) -> None:
        """Lets go: what has not ended is cancelled."""
        if self._closed:
            return
        self._closed = True
        if not self._ended:
            self._ticket.cancel()
            self._metrics.finished("cancelled", 0, 0, time.perf_counter() - self._begun)
            self._log(
                "the server ends" if self._closing.is_set() else "the client left", len(self.ask.prompt), 0, 0
            )
        self._on_close()

    def _log(self, reason: str, num_prompt: int, num_cached: int, num_generated: int) -> None:
        seconds = time.perf_counter() - self._begun
        logger.info(
            "%s: %d tokens of prompt (%d cached), %d generated, %.2f s, %s",
            *(self._ticket.id, num_prompt, num_cached, num_generated, seconds, reason),
        )


def of_core(error: Exception) -> ApiError:
    """What the core says of a request, as an answer to it."""
    from krasis.formats.errors import KrasisError
    from krasis.runtime.server.errors import engine_lost, internal, queue_is_full
    from krasis.runtime.serving.api import EngineLostError, QueueFullError

    if isinstance(error, QueueFullError):
        return queue_is_full(error.retry_after_s)
    if isinstance(error, ContextTooLongError):
        return too_long(error.num_tokens, error.context)
    if isinstance(error, CoreClosedError):
        return shutting_down()
    if isinstance(error, EngineLostError):
        return engine_lost(str(error), error.retry_after_s)
    return from_krasis(error) if isinstance(error, KrasisError) else internal()


def _finite(value: float) -> float:
    return max(float(value), LEAST_LOGPROB)
