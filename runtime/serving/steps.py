"""What a scheduler is told, and what it tells the core to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from krasis.formats.errors import UsageError
from krasis.runtime.batch import WantedLogits
from krasis.runtime.serving.ids import Ids, TokenIds
from krasis.runtime.serving.slots import Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a scheduler decides. Raises UsageError for a value that makes no sense.

    pass_rows: the most rows of a batch. company_s: how long a prompt waits for others to share its pass.
    short_rows: a suffix of so many rows streams few experts: it waits for nobody.
    stream_rows: a pass costs as much as computing so many rows, however few it has: a prompt waits for
    another's state only if that saves more. decode_share: after a pass, the answers under way get this share
    of the time before the next one begins. patience_s: who waited longer goes first, whatever the priorities.
    between_s: during a pass, so long after their last step the answers under way get another, between two of
    its layers; steps that take long come less often.
    """

    pass_rows: int
    company_s: float = 0.05
    short_rows: int = 32
    stream_rows: int = 4096
    decode_share: float = 0.2
    patience_s: float = 60.0
    between_s: float = 0.25

    def __post_init__(self) -> None:
        if self.pass_rows < 1 or not 0 <= self.decode_share < 1:
            raise UsageError("a scheduler's limits make no sense", got=self)


@dataclass(slots=True, eq=False)
class Job:
    """A request as the scheduler sees it.

    ids: the prompt's, of which there are num_prompt, then the answer's. done: of these, computed or found.
    arrived_s: in the caller's time. reads_cache: whether a prefix may be taken over. keeps: whether its state
    may be of use to others. wants_all: logits of the whole prompt are wanted. pinned: the place of the slot
    that it must have. slot: None while it waits for one. has_begun: a pass with it was begun.
    """

    id: str
    ids: Ids
    arrived_s: float
    priority: int = 0
    is_side: bool = False
    conversation: str = ""
    reads_cache: bool = True
    keeps: bool = True
    wants_all: bool = False
    pinned: int | None = None
    slot: Slot | None = None
    done: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    has_begun: bool = False
    has_joined: bool = False
    number: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def prompt(self) -> TokenIds:
        """The prompt's ids."""
        return self.ids.first(self.num_prompt)

    @property
    def remaining(self) -> int:
        """Ids that are yet to be computed."""
        return len(self.ids) - self.done


@dataclass(frozen=True, slots=True)
class Found:
    """A stored prefix. key: the store's name for it. length: tokens that a prompt may take over."""

    key: int
    length: int


class PrefixIndex(Protocol):
    """What a scheduler asks of the prefix store."""

    def match(self, prompt: TokenIds) -> Found | None:
        """The prefix that has most in common with a prompt; its last token is never counted."""
        ...

    def covers(self, tokens: TokenIds) -> bool:
        """Whether a stored prefix begins with all of tokens."""
        ...

    def hold(self, user: str, key: int) -> None:
        """The prefix is not evicted until ``release``."""
        ...

    def release(self, user: str) -> None:
        """What user held may be evicted."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where a job's first length tokens come from: a slot (maybe its own), a stored prefix, or nowhere."""

    length: int = 0
    slot: Slot | None = None
    key: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Give the job the slot, with what source has. A slot whose number is negative is not open yet."""

    job: Job
    slot: Slot
    source: Source


@dataclass(frozen=True, slots=True)
class Keep:
    """Offer the prefix store what the slot holds, which is about to be overwritten."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one job in a batch: its ids start..start+rows-1. guesses: tokens that may follow, of an answer
    that has the batch to itself; their logits are wanted too.
    """

    job: Job
    start: int
    rows: int
    logits: WantedLogits
    guesses: tuple[int, ...] = ()

    @property
    def num_logits(self) -> int:
        """Rows of logits that the part gives."""
        return {"last": 1, "all": self.rows, "none": 0}[self.logits] + len(self.guesses)


@dataclass(frozen=True, slots=True)
class Run:
    """Compute. is_pass: prompts; else one row of each answer under way."""

    parts: Sequence[Part]
    is_pass: bool


@dataclass(frozen=True, slots=True)
class Sleep:
    """Nothing to do till until_s, or till something new comes; None: only then."""

    until_s: float | None


Step = Place | Keep | Run | Sleep
