"""Who has which tokens and experts."""

from __future__ import annotations

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.gpu.partition import Partition

RANKS = (1, 2, 3, 4, 5, 8)
TOKENS = (*range(40), 127, 128, 129, 1000, 9999, 10_000)


SEVERAL = ((1, 1), (1,) * 5, (1,) * 64, (2, 3), (5, 1, 2), (8000, 2000), (3, 4000, 1, 1, 997), (7,) * 20)


def tokens_of(partition: Partition, lengths: int | tuple[int, ...], rank: int) -> list[int]:
    lengths = (lengths,) if isinstance(lengths, int) else lengths
    return [token for begin, end in partition.segments(lengths, rank) for token in range(begin, end)]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_token_has_one_rank(num_ranks: int) -> None:
    partition = Partition(num_ranks)
    for num_tokens in TOKENS:
        owned = [tokens_of(partition, num_tokens, rank) for rank in range(num_ranks)]
        assert sorted(token for one in owned for token in one) == list(range(num_tokens))
        assert all(one == sorted(one) for one in owned)
        lengths = [len(one) for one in owned]
        assert lengths == [partition.own_tokens(num_tokens, rank) for rank in range(num_ranks)]
        assert max(lengths) - min(lengths) <= 1
        assert partition.rows_per_rank(num_tokens) == max(lengths)
        assert partition.gathered_rows(num_tokens) - num_tokens < num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
def test_the_last_token_is_rank_0s(num_ranks: int) -> None:
    for num_tokens in TOKENS[1:]:
        assert tokens_of(Partition(num_ranks), num_tokens, 0)[-1] == num_tokens - 1


@pytest.mark.parametrize("num_ranks", RANKS)
def test_segments_are_two_ranges_none_empty(num_ranks: int) -> None:
    for num_tokens in TOKENS:
        for rank in range(num_ranks):
            segments = Partition(num_ranks).segments((num_tokens,), rank)
            assert len(segments) <= 2
            assert all(begin < end for begin, end in segments)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("start", [0, 5000])
def test_attention_work_is_even(num_ranks: int, start: int) -> None:
    """Token t reads start + t + 1 keys."""
    num_tokens = 10_000
    work = [
        sum(start + token + 1 for token in tokens_of(Partition(num_ranks), num_tokens, rank))
        for rank in range(num_ranks)
    ]
    assert max(work) <= 1.002 * sum(work) / num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
def test_blocks_say_where_gathered_rows_are(num_ranks: int) -> None:
    partition = Partition(num_ranks)
    for lengths in (*((num_tokens,) for num_tokens in TOKENS), *SEVERAL):
        num_tokens = sum(lengths)
        rows = [-1] * partition.gathered_rows(num_tokens)
        for begin, end, row in partition.blocks(lengths):
            rows[row : row + end - begin] = range(begin, end)
        per_rank = partition.rows_per_rank(num_tokens)
        for rank in range(num_ranks):
            own = tokens_of(partition, lengths, rank)
            block = rows[rank * per_rank : (rank + 1) * per_rank]
            assert block == own + [-1] * (per_rank - len(own))


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("lengths", SEVERAL, ids=lambda lengths: "-".join(map(str, lengths[:5])))
def test_tokens_of_several_sequences_have_one_rank_each(num_ranks: int, lengths: tuple[int, ...]) -> None:
    partition, num_tokens = Partition(num_ranks), sum(lengths)
    owned = [tokens_of(partition, lengths, rank) for rank in range(num_ranks)]
    assert sorted(token for one in owned for token in one) == list(range(num_tokens))
    assert all(one == sorted(one) for one in owned)
    assert [len(one) for one in owned] == [
        partition.own_tokens(num_tokens, rank) for rank in range(num_ranks)
    ]
    borders = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    for rank in range(num_ranks):
        for begin, end in partition.segments(lengths, rank):
            assert begin < end
            assert sum(begin < border < end for border in borders) == 0


@pytest.mark.parametrize("num_ranks", RANKS)
def test_attention_work_of_several_sequences_is_even(num_ranks: int) -> None:
    """Though they are of different lengths and go on from different positions."""
    lengths, starts = (8000, 2000, 1, 500), (0, 30_000, 40_000, 7)
    keys = [
        start + token + 1 for length, start in zip(lengths, starts, strict=True) for token in range(length)
    ]
    work = [
        sum(keys[token] for token in tokens_of(Partition(num_ranks), lengths, rank))
        for rank in range(num_ranks)
    ]
    assert max(work) <= 1.005 * sum(work) / num_ranks


def test_experts_that_ranks_do_not_divide() -> None:
    assert [Partition(3).experts(128, rank) for rank in range(3)] == [(0, 43), (43, 43), (86, 42)]


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="more ranks than experts"):
        Partition(5).experts(4, 0)
    with pytest.raises(UsageError, match="at least one rank"):
        Partition(0)
