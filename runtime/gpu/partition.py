"""Which tokens of a prefill chunk each rank attends for. Pure arithmetic.

Causal attention of token t costs about start + t, so equal contiguous parts would leave the last rank with
most of the work. The chunk is cut into 2R segments of equal length and rank r takes segments r and 2R-1-r:
the early and cheap one makes up for the late and dear one. Lengths differ by at most one, the longer ones
last; so the tokens of two ranks differ by at most one, and **the last token is always rank 0's**, also of a
chunk of one token.

Ranks exchange rows in blocks of ``rows_per_rank`` = ceil(T / R) rows, rank 0's first. A rank with one token
fewer fills its last row with padding; so every collective has equal parts and no rank's rows are moved to
other places.
"""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.errors import UsageError
from krasis.runtime.planning.placement import rank_experts

Segment = tuple[int, int]  # [begin, end) in tokens of the chunk


@dataclass(frozen=True, slots=True)
class Partition:
    """How tokens are shared out among num_ranks ranks. Raises UsageError for none."""

    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise UsageError("at least one rank is needed", got=self.num_ranks)

    def segments(self, num_tokens: int, rank: int) -> tuple[Segment, ...]:
        """Tokens of a rank, in rising order: at most two ranges, none of them empty."""
        count = 2 * self.num_ranks
        pair = (rank, count - 1 - rank)
        cuts = [(_cut(num_tokens, count, index), _cut(num_tokens, count, index + 1)) for index in pair]
        return tuple((begin, end) for begin, end in cuts if begin < end)

    def own_tokens(self, num_tokens: int, rank: int) -> int:
        """How many tokens a rank has."""
        return sum(end - begin for begin, end in self.segments(num_tokens, rank))

    def rows_per_rank(self, num_tokens: int) -> int:
        """Rows of one rank's block: its tokens, then at most one row of padding."""
        return -(-num_tokens // self.num_ranks)

    def gathered_rows(self, num_tokens: int) -> int:
        """Rows of all ranks' blocks."""
        return self.rows_per_rank(num_tokens) * self.num_ranks

    def blocks(self, num_tokens: int) -> tuple[tuple[int, int, int], ...]:
        """Where all tokens lie among the gathered rows: (begin, end, first row), rank after rank."""
        found = []
        for rank in range(self.num_ranks):
            row = rank * self.rows_per_rank(num_tokens)
            for begin, end in self.segments(num_tokens, rank):
                found.append((begin, end, row))
                row += end - begin
        return tuple(found)

    def experts(self, num_experts: int, rank: int) -> tuple[int, int]:
        """(first, count) of a rank's experts. Raises UsageError if there are fewer experts than ranks."""
        if num_experts < self.num_ranks:
            raise UsageError("more ranks than experts", got=self.num_ranks, limit=num_experts)
        return rank_experts(num_experts, self.num_ranks)[rank]


def _cut(num_tokens: int, count: int, index: int) -> int:
    """Where segment ``index`` of ``count`` begins; the last num_tokens % count segments are one longer."""
    base, extra = divmod(num_tokens, count)
    return index * base + max(0, index - (count - extra))
