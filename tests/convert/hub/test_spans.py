"""Spans against sets of positions."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from krasis.convert.hub.spans import Spans

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6)


def positions(spans):
    return {at for begin, end in spans for at in range(begin, end)}


@given(SPANS, SPANS, st.integers(0, 30), st.integers(0, 30))
def test_as_sets(one, other, begin, end):
    left, right = positions(one), positions(other)
    assert positions(Spans(one)) == left
    assert Spans(one).num_bytes == len(left)
    assert positions(Spans(one).union(other)) == left | right
    assert positions(Spans(one).without(other)) == left - right
    assert positions(Spans(one).within(begin, end)) == left & set(range(begin, end))
    listed = list(Spans(one))
    assert all(first[1] < second[0] for first, second in pairwise(listed))


def test_gaps():
    assert list(Spans([(0, 2), (5, 6), (20, 21)], max_gap=3)) == [(0, 6), (20, 21)]
