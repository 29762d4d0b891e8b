"""What a server's outer part and its engine core say to each other: plain records and three protocols."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import KrasisError, ResourceError, UsageError
from krasis.runtime.settings import SamplingSettings

Kind = Literal["answer", "reasoning"]
Reason = Literal["end", "stop", "length", "context", "cancelled"]


class QueueFullError(ResourceError):
    """As many requests wait as may. retry_after_s: when to ask again, in seconds."""

    def __init__(self, what: str, *, retry_after_s: float, got: object = None, limit: object = None) -> None:
        super().__init__(what, got=got, limit=limit, hint="ask again later")
        self.retry_after_s = retry_after_s


class ContextTooLongError(UsageError):
    """A prompt that the context has no room for. num_tokens: the prompt's; context: what there is."""

    def __init__(self, num_tokens: int, context: int) -> None:
        super().__init__(
            "the prompt does not fit the context", got=f"{num_tokens} tokens", limit=f"{context} tokens"
        )
        self.num_tokens, self.context = num_tokens, context


class CoreClosedError(ResourceError):
    """The core is closing, or has been closed: it answers no more."""


class EngineLostError(ResourceError):
    """The engine's process has ended. retry_after_s: when to ask again, in seconds."""

    def __init__(self, what: str, *, got: object = None, retry_after_s: float = 1.0) -> None:
        super().__init__(what, got=got, hint="send the request again")
        self.retry_after_s = retry_after_s


class Mask(Protocol):
    """Which tokens may come next in one answer, such as a grammar's. Only the core's thread calls it."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """bool [vocab] (or of more rows, which are ignored); None: all of them."""
        ...

    def accept(self, token: int) -> None:
        """The token that was picked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of the core.

    id: the caller's name for it, for logs. prompt: token ids, at least one.
    sampling: how tokens are picked. max_tokens: the most of an answer, reasoning and all; None = to the end
    of the context; 0 = none, the prompt alone is computed.
    stops: texts (or special tokens) that end the answer. is_plain: the prompt is a text to go on with and no
    turn of a chat: only named tokens end it and nothing is reasoning. split_thinking: reasoning comes as
    deltas of its own kind. ignore_ends: end tokens end nothing (load tests).
    logprobs: None = none; n = of each picked token, and of the n most likely beside it. sampled_logprobs: not
    of the model's own probabilities, but of those by which tokens are picked, after all that changes them.
    prompt_logprobs: the same of the prompt's tokens, by one ``PromptScores``; then all of the prompt is
    computed. logit_bias: id -> what is added to its logit.
    make_mask: called once, in the core's thread, for what restricts the tokens (a grammar); None = nothing.
    priority: the higher goes first, within the fairness bound.
    side: a question beside the main conversation (a title, tags): its state never takes the place of a main
    one's. conversation: a name that the requests of one conversation share, if the client gives one.
    use_cache: False = the prompt is computed anew, and not kept.
    progress: whether ``Progress`` events are wanted. slot: the one it must have, by its place in
    ``CoreStatus.slots``, busy or not; None = whichever serves it best.
    """

    id: str
    prompt: Sequence[int]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    is_plain: bool = False
    split_thinking: bool = True
    ignore_ends: bool = False
    logprobs: int | None = None
    sampled_logprobs: bool = False
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    make_mask: Callable[[], Mask] | None = None
    priority: int = 0
    side: bool = False
    conversation: str = ""
    use_cache: bool = True
    progress: bool = True
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Natural logarithm of a token's probability, before temperature, penalties, bias and masks.

    rank: 1 = the most likely. top: (id, log probability) of the most likely tokens, the best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt is. num_processed: tokens that are in place, of num_total; num_cached: of these,
    found and not computed. elapsed_s: since the request was submitted. Sent when it has a slot, now and then
    during its pass, and when all is in place; none while it waits.
    """

    num_processed: int
    num_total: int
    num_cached: int
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptScores:
    """scores: one per prompt token; None for the first, which nothing comes before."""

    scores: tuple[Score | None, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds. tokens: ids picked, one, or none for further text that was held back. text: may be
    empty (part of a character, of a stop string, of a marker). scores: of tokens, if asked for.
    """

    tokens: tuple[int, ...]
    text: str
    kind: Kind = "answer"
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. num_cached: of the prompt's, found and not computed. num_reasoning: of those generated.
    num_generated: those of deltas, and the end or stop token, if one came. num_drafted: tokens that were
    guessed ahead and computed; num_accepted: of these, the ones that were picked."""

    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    num_reasoning: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. queue_s: from submission to the pass. prefill_s: of the pass. time_to_first_token_s: from
    submission. decode_s: from the first token to the last."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer.

    reason: ``end`` (an end token), ``stop`` (a stop string or token: stop says which), ``length``
    (max_tokens), ``context`` (the context is full), ``cancelled``.
    """

    reason: Reason
    usage: Usage = Usage()
    timings: Timings = Timings()
    stop: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that an error ended. usage, timings: as far as it came."""

    error: KrasisError
    usage: Usage = Usage()
    timings: Timings = Timings()


Event = Progress | PromptScores | Delta | Finished | Failed


class Ticket(Protocol):
    """A request that was taken on. Any thread may call; one reader reads the events, by either iterator."""

    id: str

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """The events as they come, up to and with ``Finished`` or ``Failed``. timeout_s: the longest wait
        for one; then TimeoutError, and a new iterator goes on where this one was."""
        ...

    def async_events(self) -> AsyncIterator[Event]:
        """The same for a running asyncio loop. It does not cancel by being left: call ``cancel``."""
        ...

    def cancel(self) -> None:
        """Ends the answer at the next token, with ``Finished("cancelled")``. A prompt that is being computed
        is computed to its end and kept; one that waits is dropped at once. Twice is once."""
        ...


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the start; none ever falls.

    num_passes: prefill passes; num_shared_passes: of these, with several prompts; num_pass_rows: their rows.
    num_decode_steps, num_decode_rows: decode batches and the answers in them. num_drafts: of these batches,
    those with guesses; num_drafted, num_accepted: these, and how many were right, each a token more. pass_s,
    decode_s: seconds in both.
    num_joined: requests that waited for another's pass instead of computing.
    num_prefix_queries, num_prefix_hits: in tokens, as vLLM counts: prompt tokens looked up, and found.
    num_prompt_tokens, num_generated_tokens: of all requests. num_finished: by reason, ``failed`` among them.
    num_refused: at submission. num_evicted: prefixes dropped for room. num_stored, num_restored: prefixes
    moved from a slot into RAM, and from RAM or disk into a slot. num_restarts: of the engine's process, after
    it was lost.
    """

    num_requests: int = 0
    num_refused: int = 0
    num_restarts: int = 0
    num_passes: int = 0
    num_shared_passes: int = 0
    num_pass_rows: int = 0
    num_decode_steps: int = 0
    num_decode_rows: int = 0
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    pass_s: float = 0.0
    decode_s: float = 0.0
    num_joined: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_evicted: int = 0
    num_stored: int = 0
    num_restored: int = 0
    num_finished: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """One slot. num_tokens: positions it holds. request: the id of who uses it, "" if nobody does."""

    slot: int
    num_tokens: int
    request: str
    is_side: bool = False


@dataclass(frozen=True, slots=True)
class CoreStatus:
    """A moment's view, for /metrics, /slots and /health. cache_usage: the share of all slots' positions in
    use, 0 to 1. store_bytes, num_stored: of the prefixes in RAM."""

    num_running: int
    num_waiting: int
    slots: tuple[SlotStatus, ...]
    cache_usage: float
    store_bytes: int
    num_stored: int
    counters: Counters
    is_closing: bool = False


class Core(Protocol):
    """The one owner of a backend. Any thread may call.

    context: tokens of one conversation, prompt and answer together. vocab_size: ids are below it.
    description: one line: what runs the model, and how.
    """

    context: int
    vocab_size: int
    description: str

    def submit(self, request: Request) -> Ticket:
        """Takes a request on, at once. Raises what can be known now: ContextTooLongError, QueueFullError,
        UsageError (no tokens, an id outside the vocabulary, a stop that cannot be met), CoreClosedError."""
        ...

    def status(self) -> CoreStatus:
        """Never waits for a pass."""
        ...

    def trouble(self) -> KrasisError | None:
        """What ``submit`` would raise whatever is asked: CoreClosedError, EngineLostError. None: it takes
        requests. Never waits."""
        ...

    def close(self, save_prefixes: bool = True) -> None:
        """Ends every request (``Failed`` with CoreClosedError) after the step under way, saves prefixes where
        there is a folder for them, and frees the backend. Twice is once."""
        ...


@dataclass(frozen=True, slots=True)
class SlotFile:
    """What was saved or restored of a slot: its tokens and bytes."""

    num_tokens: int
    num_bytes: int


class Slots(Protocol):
    """What an operator may do with a core's slots; see ``slot_actions.SlotActions``. folder: of their
    files."""

    folder: Path | None

    def save(self, number: int, name: str) -> Future[SlotFile]:
        """Writes what the slot holds."""
        ...

    def restore(self, number: int, name: str) -> Future[SlotFile]:
        """Fills the slot from a file."""
        ...

    def erase(self, number: int) -> Future[int]:
        """Empties the slot; gives how many tokens it held."""
        ...
