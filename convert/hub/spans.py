"""Sets of byte positions as disjoint half-open spans in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Span = tuple[int, int]


class Spans:
    """Positions that belong to any of the spans given. Empty spans are nothing."""

    __slots__ = ("_spans",)

    def __init__(self, spans: Iterable[Span] = (), max_gap: int = 0) -> None:
        """max_gap: spans that are at most so far apart become one."""
        self._spans: list[Span] = []
        for begin, end in sorted(span for span in spans if span[0] < span[1]):
            if self._spans and begin <= self._spans[-1][1] + max_gap:
                last = self._spans[-1]
                self._spans[-1] = (last[0], max(last[1], end))
            else:
                self._spans.append((begin, end))

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __bool__(self) -> bool:
        return bool(self._spans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and self._spans == other._spans

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Spans({self._spans})"

    @property
    def num_bytes(self) -> int:
        """How many positions there are."""
        return sum(end - begin for begin, end in self._spans)

    def union(self, other: Iterable[Span]) -> Spans:
        """The positions of either."""
        return Spans((*self._spans, *other))

    def within(self, begin: int, end: int) -> Spans:
        """The positions from begin to end (exclusive)."""
        return Spans((max(begin, first), min(end, last)) for first, last in self._spans)

    def without(self, other: Iterable[Span]) -> Spans:
        """The positions that ``other`` does not have."""
        left = list(self._spans)
        for begin, end in other:
            parts: list[Span] = []
            for first, last in left:
                parts += [(first, min(last, begin)), (max(first, end), last)]
            left = [part for part in parts if part[0] < part[1]]
        return Spans(left)
