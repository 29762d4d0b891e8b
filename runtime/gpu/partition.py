"""Which tokens of a prefill chunk each rank attends for. Pure arithmetic.

Causal attention of token t costs about start + t, so equal contiguous parts would leave the last rank with
most of the work. The chunk is cut into 2R segments of equal length and rank r takes segments r and 2R-1-r:
the early and cheap one makes up for the late and dear one. Lengths differ by at most one, the longer ones
last; so the tokens of two ranks differ by at most one, and **the last token is always rank 0's**, also of a
chunk of one token.

A chunk of several sequences is cut as if all first segments of its sequences stood before all second ones,
and so on: so every rank has early and late tokens of each, and the counts still differ by at most one. Whose
the last tokens are is then not said.

Ranks exchange rows in blocks of ``rows_per_rank`` = ceil(T / R) rows, rank 0's first. A rank with one token
fewer fills its last row with padding; so every collective has equal parts and no rank's rows are moved to
other places.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def segments(self, lengths: Sequence[int], rank: int) -> tuple[Segment, ...]:
        """Tokens of a rank of a chunk whose sequences have so many, in rising order: ranges that are not
        empty and lie in one sequence each; at most two of one sequence alone.
        """
        count, num_tokens = 2 * self.num_ranks, sum(lengths)
        found: list[Segment] = []
        row = 0
        for begin, end in self._dealt(lengths):
            for index in (rank, count - 1 - rank):
                first = max(row, _cut(num_tokens, count, index))
                last = min(row + end - begin, _cut(num_tokens, count, index + 1))
                if first < last:
                    found.append((begin + first - row, begin + last - row))
            row += end - begin
        return _joined(found, lengths)

    def _dealt(self, lengths: Sequence[int]) -> list[Segment]:
        """The segments of all sequences: all first ones, then all second ones, and so on."""
        count, begins = 2 * self.num_ranks, [sum(lengths[:index]) for index in range(len(lengths))]
        cuts = [
            [begin + _cut(length, count, i) for i in range(count + 1)]
            for begin, length in zip(begins, lengths, strict=True)
        ]
        return [(cut[i], cut[i + 1]) for i in range(count) for cut in cuts if cut[i] < cut[i + 1]]

    def own_tokens(self, num_tokens: int, rank: int) -> int:
        """How many tokens a rank has."""
        return sum(end - begin for begin, end in self.segments((num_tokens,), rank))

    def rows_per_rank(self, num_tokens: int) -> int:
        """Rows of one rank's block: its tokens, then at most one row of padding."""
        return -(-num_tokens // self.num_ranks)

    def gathered_rows(self, num_tokens: int) -> int:
        """Rows of all ranks' blocks."""
        return self.rows_per_rank(num_tokens) * self.num_ranks

    def blocks(self, lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Where all tokens lie among the gathered rows: (begin, end, first row), rank after rank."""
        found = []
        for rank in range(self.num_ranks):
            row = rank * self.rows_per_rank(sum(lengths))
            for begin, end in self.segments(lengths, rank):
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


def _joined(ranges: Sequence[Segment], lengths: Sequence[int]) -> tuple[Segment, ...]:
    """The ranges in rising order; those that follow each other in a sequence are one."""
    borders = {sum(lengths[:index]) for index in range(len(lengths))}
    found: list[Segment] = []
    for begin, end in sorted(ranges):
        if found and found[-1][1] == begin and begin not in borders:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)
