"""One request at work: from logits to events."""

from __future__ import annotations

from krasis.formats.errors import KrasisError
from krasis.runtime.batch import Logits
from krasis.runtime.generation import AnswerWriter, Piece, StopStrings
from krasis.runtime.serving.api import (
    Delta,
    Failed,
    Finished,
    Progress,
    PromptScores,
    Reason,
    Request,
    Score,
    Timings,
    Usage,
)
from krasis.runtime.serving.ids import Ids
from krasis.runtime.serving.picking import Picker, scores
from krasis.runtime.serving.steps import Job
from krasis.runtime.serving.ticket import QueuedTicket
from krasis.runtime.text.ends import TextEnds
from krasis.runtime.text.thinking import REASONING


class Sequence:
    """The core's side of a request. job: what the scheduler sees of it. outcome: the reason of its end,
    ``failed`` for an error, "" till then. num_drafted: tokens that were guessed and computed; num_accepted:
    how many of them were right.

    context: the positions there are. Times are the caller's, in seconds.
    """

    def __init__(
        self, request: Request, name: str, ticket: QueuedTicket, ends: TextEnds, context: int, now_s: float
    ) -> None:
        """name: the scheduler's, of which there is only one."""
        self.request, self.ticket = request, ticket
        self.job = _job(request, name, now_s)
        self.outcome = ""
        self.num_drafted = self.num_accepted = 0
        self._ends = ends
        stops = StopStrings(ends.stops.texts, ends.stops.signs.values())
        self._stops, self._writer = stops, AnswerWriter(ends.stream, stops, ends.splitter)
        room = context - self.job.num_prompt + 1  # the last token needs no place: nothing attends to it
        wanted = request.max_tokens
        self._limit = room if wanted is None else min(room, wanted)
        self._at_limit: Reason = "context" if wanted is None or wanted > room else "length"
        self._picker: Picker | None = None
        self._prompt_scores: list[Score | None] = [None]
        self._context = self.job.prompt.tolist()
        self._answer: list[int] = []
        self._num_ends = self._num_reasoning = 0
        self._submitted_s = now_s
        self._begun_s = self._first_s = self._last_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether its last event was sent."""
        return bool(self.outcome)

    @property
    def room(self) -> int:
        """Tokens that it may still have."""
        return self._limit - len(self._answer)

    @property
    def usage(self) -> Usage:
        """So far."""
        job, num_generated = self.job, len(self._answer) + self._num_ends
        drafts = (self.num_drafted, self.num_accepted)
        return Usage(job.num_prompt, job.num_cached, num_generated, self._num_reasoning, *drafts)

    @property
    def timings(self) -> Timings:
        """So far."""
        begin, first = self._submitted_s, self._first_s
        begun = self._begun_s or self._last_s or begin
        return Timings(
            queue_s=max(begun - begin, 0.0),
            prefill_s=first - begun if first else 0.0,
            time_to_first_token_s=first - begin if first else 0.0,
            decode_s=self._last_s - first if first else 0.0,
        )

    def begin(self, now_s: float) -> None:
        """Its first batch is being computed."""
        if not self._begun_s:
            self._begun_s = now_s

    def progress(self, num_processed: int, now_s: float) -> None:
        """Says how far the prompt is."""
        if self.request.progress and not self._answer:
            job = self.job
            done = min(num_processed, job.num_prompt)
            self.ticket.put(Progress(done, job.num_prompt, job.num_cached, now_s - self._submitted_s))

    def score_prompt(self, logits: Logits, start: int) -> None:
        """logits: of the prompt's tokens from start on. Says the scores when all are there."""
        following = self.job.prompt[start + 1 : start + 1 + len(logits)]
        num_top = self.request.prompt_logprobs or 0
        self._prompt_scores += scores(logits[: len(following)], following, num_top)
        if start + len(logits) == self.job.num_prompt:
            self.ticket.put(PromptScores(tuple(self._prompt_scores)))

    def take(self, logits: Logits, now_s: float) -> int | None:
        """Picks a token by logits [vocab] and says what came of it. None: the answer is over."""
        self._last_s = now_s
        self._first_s = self._first_s or now_s
        if not self._limit:
            self._finish(self._at_limit)
            return None
        if self._picker is None:
            self._picker = Picker(self.request)
        token, score = self._picker.pick(logits, self._context, self._answer)
        if reason := self._reason_of(token):
            self._num_ends = 1
            self._say(self._writer.finish(), None)
            if score is not None and self.request.is_plain:
                # Who measures counts on a row for each token that was made, the end among them. A chat's
                # end is a mark between messages, and no part of one.
                self.ticket.put(Delta((), "", scores=(score,)))
            self._finish(reason, self._stop_text(token) if reason == "stop" else "")
            return None
        self._answer.append(token)
        self._context.append(token)
        self._say(self._writer.push(token), score)
        if self._writer.is_stopped:
            self._finish("stop", self._stop_text(None))
        elif len(self._answer) >= self._limit:
            self._say(self._writer.finish(), None)
            self._finish(self._at_limit)
        return None if self.is_over else token

    def cancel(self) -> None:
        """Says that it was cancelled."""
        self._finish("cancelled")

    def fail(self, error: KrasisError) -> None:
        """Says that an error ended it."""
        self._end(Failed(error, self.usage, self.timings))

    def _finish(self, reason: Reason, stop: str = "") -> None:
        self._end(Finished(reason, self.usage, self.timings, stop))

    def _end(self, event: Finished | Failed) -> None:
        self.outcome = event.reason if isinstance(event, Finished) else "failed"
        self.ticket.put(event)

    def _reason_of(self, token: int) -> Reason | None:
        if token in self._ends.end_tokens and not self.request.ignore_ends:
            return "end"
        return "stop" if token in self._ends.stops.ids else None

    def _stop_text(self, token: int | None) -> str:
        """The stop as the caller wrote it. token: a special one that is a stop; None: a text was met."""
        stops = self._ends.stops
        if token is not None:
            return stops.names.get(token, "")
        text = self._stops.met
        for number, sign in stops.signs.items():
            text = text.replace(sign, stops.names.get(number, ""))
        return text

    def _say(self, pieces: list[Piece], score: Score | None) -> None:
        for piece in pieces:
            tokens = () if piece.token is None else (piece.token,)
            if not tokens and not piece.text:
                continue
            is_reasoning = piece.kind == REASONING
            self._num_reasoning += is_reasoning and len(tokens)
            found = () if score is None or not tokens else (score,)
            self.ticket.put(Delta(tokens, piece.text, "reasoning" if is_reasoning else "answer", found))


def _job(request: Request, name: str, now_s: float) -> Job:
    scores_prompt = request.prompt_logprobs is not None
    return Job(
        id=name,
        ids=Ids(request.prompt),
        arrived_s=now_s,
        priority=request.priority,
        is_side=request.side,
        conversation=request.conversation,
        reads_cache=request.use_cache and not scores_prompt,
        keeps=request.use_cache,
        wants_all=scores_prompt,
        pinned=request.slot,
    )
