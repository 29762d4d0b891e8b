"""A core that answers as it is told: a real tokenizer, no model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from krasis.formats.errors import KrasisError
from krasis.runtime.generation import StopStrings
from krasis.runtime.serving.api import (
    ContextTooLongError,
    CoreClosedError,
    CoreStatus,
    Counters,
    Delta,
    Event,
    Failed,
    Finished,
    Progress,
    PromptScores,
    Request,
    Score,
    SlotStatus,
    Timings,
    Usage,
)
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.ends import ends_of_text

LAST = (Finished, Failed)
APART = "\x1f"  # between texts of a script that are no token together


class ScriptedTicket:
    """See ``serving.api.Ticket``."""

    def __init__(self, request: Request) -> None:
        self.id, self.request = request.id, request
        self.cancelled = threading.Event()
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            for loop, flag in self._waiting:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(flag.set)

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        at = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda at=at: len(self._events) > at, timeout_s):
                    raise TimeoutError
                event = self._events[at]
            at += 1
            yield event
            if isinstance(event, LAST):
                return

    async def async_events(self) -> AsyncIterator[Event]:
        flag, at = asyncio.Event(), 0
        with self._changed:
            self._waiting.append((asyncio.get_running_loop(), flag))
        while True:
            while at < len(self._events):
                event = self._events[at]
                at += 1
                yield event
                if isinstance(event, LAST):
                    return
            flag.clear()
            if at == len(self._events):
                await flag.wait()

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class ScriptedCore:
    """script: the answer's text (with thinking and calls as the model would write them) for a request; an
    error ends it. prefill_s, token_s: how long things take. limit: the most requests at a time."""

    assets: TextAssets
    script: Callable[[Request], str | KrasisError] = lambda _: "Hello there."
    context: int = 2048
    prefill_s: float = 0.0
    token_s: float = 0.0
    refusal: KrasisError | None = None
    vocab_size: int = 4096
    description: str = "a script"
    requests: list[Request] = field(default_factory=list)
    tickets: list[ScriptedTicket] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    num_finished: dict[str, int] = field(default_factory=dict)
    closed: bool = False
    saved: bool | None = None

    def submit(self, request: Request) -> ScriptedTicket:
        if self.closed:
            raise CoreClosedError("the core is closed")
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt) >= self.context:
            raise ContextTooLongError(len(request.prompt), self.context)
        ticket = ScriptedTicket(request)
        self.requests.append(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._run, args=(ticket,), daemon=True).start()
        return ticket

    def status(self) -> CoreStatus:
        running = sum(1 for one in self.tickets if not isinstance((one._events or [None])[-1], LAST))
        counters = Counters(num_requests=len(self.requests), num_finished=dict(self.num_finished))
        return CoreStatus(running, 0, (SlotStatus(0, 0, ""),), 0.0, 0, 0, counters, self.closed)

    def trouble(self) -> KrasisError | None:
        return CoreClosedError("the core is closed") if self.closed else None

    def close(self, save_prefixes: bool = True) -> None:
        self.closed, self.saved = True, save_prefixes
        for ticket in self.tickets:
            ticket.cancel()

    # ---- one answer ----------------------------------------------------------------------------------------

    def _run(self, ticket: ScriptedTicket) -> None:
        request = ticket.request
        prompt = list(request.prompt)
        cached = max((_common(prompt, one) for one in self.prompts), default=0)
        cached = min(cached, len(prompt) - 1)
        self.prompts.append(prompt)
        ticket.put(Progress(cached, len(prompt), cached))
        if ticket.cancelled.wait(self.prefill_s):
            self._end(ticket, "cancelled", len(prompt), cached, 0, 0)
            return
        ticket.put(Progress(len(prompt), len(prompt), cached))
        if request.prompt_logprobs is not None:
            ticket.put(
                PromptScores((None, *(self._score(one, request.prompt_logprobs) for one in prompt[1:])))
            )
        try:
            answer = self.script(request)
        except Exception as error:  # noqa: BLE001  a test's script
            answer = KrasisError(str(error))
        if isinstance(answer, KrasisError):
            ticket.put(Failed(answer, Usage(num_prompt=len(prompt))))
            return
        try:
            self._write(ticket, answer, cached)
        except Exception as error:  # noqa: BLE001  a test's script
            ticket.put(Failed(KrasisError(str(error))))

    def _write(self, ticket: ScriptedTicket, answer: str, cached: int) -> None:
        request = ticket.request
        ends = ends_of_text(
            self.assets,
            request.prompt,
            request.stops,
            is_plain=request.is_plain,
            split=request.split_thinking,
        )
        stops = StopStrings(ends.stops.texts, ends.stops.signs.values())
        count = thoughts = 0
        reason, stop, stopped = "end", "", False
        for token in self._tokens(request, answer):
            if ticket.cancelled.wait(self.token_s) if self.token_s else ticket.cancelled.is_set():
                self._end(ticket, "cancelled", len(request.prompt), cached, count, thoughts)
                return
            count += 1
            text, stopped = stops.push(ends.stream.push(token))
            scores = () if request.logprobs is None else (self._score(token, request.logprobs),)
            segments = [(one.kind, one.text) for one in ends.splitter.push(text)]
            for kind, words in segments or [(ends.splitter.kind, "")]:
                thoughts += kind == "reasoning"
                ticket.put(Delta((token,), words, kind, scores))  # type: ignore[arg-type]
                scores = ()
            if stopped:
                reason, stop = "stop", next(one for one in request.stops if one in answer)
                break
            if count == request.max_tokens:
                reason = "length"
                break
        rest = "" if stopped else stops.push(ends.stream.finish())[0] + stops.finish()
        for one in [*ends.splitter.push(rest), *ends.splitter.finish()]:
            ticket.put(Delta((), one.text, one.kind))  # type: ignore[arg-type]
        self._end(ticket, reason, len(request.prompt), cached, count, thoughts, stop)

    def _tokens(self, request: Request, answer: str) -> Sequence[int] | Iterator[int]:
        if request.max_tokens == 0:
            return []
        if request.make_mask is None:
            return self.assets.tokenizer.encode(answer)
        wanted = [token for one in answer.split(APART) for token in self.assets.tokenizer.encode(one)]
        return self._masked(request.make_mask(), wanted)

    def _masked(self, mask: Any, wanted: list[int]) -> Iterator[int]:
        """Those of the wanted tokens that are allowed when their turn comes, up to where an end is."""
        ends = self.assets.end_tokens.ids
        for token in wanted:
            allowed = mask.allowed()
            if allowed is not None and not allowed[token]:
                continue
            mask.accept(token)
            yield token
        allowed = mask.allowed()
        if allowed is not None and not any(allowed[one] for one in ends):
            raise ValueError("the script does not fill the grammar")

    def _end(
        self,
        ticket: ScriptedTicket,
        reason: Any,
        num_prompt: int,
        cached: int,
        count: int,
        thoughts: int,
        stop: str = "",
    ) -> None:
        self.num_finished[reason] = self.num_finished.get(reason, 0) + 1
        usage = Usage(num_prompt, cached, count, thoughts)
        ticket.put(Finished(reason, usage, Timings(prefill_s=0.5, decode_s=0.25), stop))

    def _score(self, token: int, num: int) -> Score:
        return Score(
            token, -0.5, 1, tuple(((token + step) % self.vocab_size, -0.5 - step) for step in range(num))
        )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
