"""Which sequence each slot of the state store holds, and who works in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from krasis.runtime.serving.ids import Ids, TokenIds, shared_length


@dataclass(slots=True, eq=False)
class Slot:
    """number: the state store's. ids, length: what it holds: the first length ids. num_prompt: of these,
    those that were a prompt; the rest was an answer. user: the id of the job in it, "" for none. is_side,
    conversation: of the last job. used_s: when it was last worked in. num_saved: ids that the prefix store
    was offered already. marks: the lengths that it can go back to; None = any.
    """

    number: int
    ids: Ids = field(default_factory=Ids)
    length: int = 0
    num_prompt: int = 0
    user: str = ""
    is_side: bool = False
    conversation: str = ""
    used_s: float = 0.0
    num_saved: int = 0
    marks: set[int] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody works in it."""
        return not self.user

    @property
    def held(self) -> TokenIds:
        """The ids whose state it holds."""
        return self.ids.first(self.length)

    def shared(self, prompt: TokenIds) -> int:
        """Tokens that a prompt may take over. The last one is left: its logits are what comes next."""
        length = min(shared_length(self.held, prompt), len(prompt) - 1)
        if self.marks is None:
            return length
        return max((mark for mark in self.marks if mark <= length), default=0)

    def forget(self) -> None:
        """Nothing is held any more."""
        self.ids, self.length, self.num_prompt, self.num_saved = Ids(), 0, 0, 0
        self.is_side, self.conversation, self.marks = False, "", None
