"""The order of copies and products: every expert once, every copy before its use, buffers in turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.experts.schedule import (
    NUM_BUFFERS,
    Group,
    Run,
    addresses,
    copies,
    layer_groups,
    num_copies,
    pass_groups,
)

RECORD = 4096
BUFFERS = [1 << 40, 2 << 40]


@st.composite
def passes(draw: st.DrawFn) -> tuple[int, int, np.ndarray, int]:
    """(first, num_experts, copied [layers, experts], group_experts)."""
    experts = draw(st.integers(1, 40))
    first = draw(st.integers(0, experts - 1))
    count = draw(st.integers(1, experts - first))
    layers = draw(st.integers(1, 4))
    bits = draw(st.lists(st.booleans(), min_size=layers * experts, max_size=layers * experts))
    return first, count, np.array(bits).reshape(layers, experts), draw(st.integers(1, experts + 2))


@given(passes())
def test_a_pass_covers_every_expert_once_and_copies_what_it_must(case: tuple) -> None:
    first, count, copied, group_experts = case
    layers = pass_groups(first, count, copied, group_experts)
    assert len(layers) == len(copied)
    for layer, groups in enumerate(layers):
        covered = [expert for group in groups for expert in range(group.begin, group.end)]
        assert covered == list(range(first, first + count))
        assert {group.layer for group in groups} == {layer}
        sent = [
            expert
            for group in groups
            for run in group.runs
            for expert in range(run.first, run.first + run.count)
        ]
        assert sent == [expert for expert in covered if copied[layer, expert]]
        for group in groups:
            assert all(group.begin <= run.first and run.first + run.count <= group.end for run in group.runs)
            assert group.num_copied <= group_experts
            # Places are filled from 0 without a gap, and neighbouring runs are really apart.
            assert [run.place for run in group.runs] == list(np.cumsum([0, *(r.count for r in group.runs)]))[
                :-1
            ]
            assert all(a.first + a.count < b.first for a, b in itertools.pairwise(group.runs))
            assert (group.sequence == -1) == (not group.runs)


@given(passes())
def test_copies_are_numbered_across_layers_and_take_turns(case: tuple) -> None:
    first, count, copied, group_experts = case
    numbered = list(copies(pass_groups(first, count, copied, group_experts)))
    assert [group.sequence for group in numbered] == list(range(len(numbered)))
    assert all(a.buffer != b.buffer for a, b in itertools.pairwise(numbered))
    assert all(group.buffer in range(NUM_BUFFERS) for group in numbered)
    assert [group.layer for group in numbered] == sorted(group.layer for group in numbered)


@given(passes())
def test_as_few_groups_as_can_be_and_even_ones(case: tuple) -> None:
    first, count, copied, group_experts = case
    for groups, mask in zip(pass_groups(first, count, copied, group_experts), copied, strict=True):
        wanted = int(mask[first : first + count].sum())
        assert num_copies(groups) == -(-wanted // group_experts)
        sizes = [group.num_copied for group in groups]
        assert max(sizes) - min(sizes) <= 1


@given(passes())
def test_every_expert_of_a_table_has_an_address_of_its_own(case: tuple) -> None:
    first, count, copied, group_experts = case
    for layer, groups in enumerate(pass_groups(first, count, copied, group_experts)):
        resident = np.where(copied[layer], 0, (np.arange(copied.shape[1]) + 1) * RECORD).astype(np.int64)
        table = addresses(groups, BUFFERS, RECORD, resident)
        own = np.arange(first, first + count)
        assert (table[own] != 0).all()
        assert np.count_nonzero(table) == count
        for group in groups:
            inside = table[group.begin : group.end]
            assert len(set(inside.tolist())) == len(inside)  # two groups of a buffer may share places
            for run in group.runs:
                expected = BUFFERS[group.buffer] + (run.place + np.arange(run.count)) * RECORD
                assert table[run.first : run.first + run.count].tolist() == expected.tolist()
        kept = [expert for expert in own if not copied[layer, expert]]
        assert table[kept].tolist() == resident[kept].tolist()


def test_a_layer_by_hand() -> None:
    copied = np.array([0, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool)
    assert layer_groups(7, 1, 8, copied, 3, sequence=4) == (
        Group(7, 1, 5, (Run(1, 2, 0), Run(4, 1, 2)), 4),
        Group(7, 5, 9, (Run(5, 1, 0), Run(7, 1, 1)), 5),
    )
    assert layer_groups(0, 0, 10, np.zeros(10, bool), 0, sequence=3) == (Group(0, 0, 10, (), -1),)


@pytest.mark.parametrize(("first", "count", "group"), [(0, 0, 2), (3, 2, 2), (-1, 2, 2), (0, 4, 0)])
def test_impossible_layers_are_refused(first: int, count: int, group: int) -> None:
    with pytest.raises(NativeError):
        layer_groups(0, first, count, np.ones(4, bool), group, 0)
