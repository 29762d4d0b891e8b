"""Prefixes in order: they find what a look at each of them finds, without one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from krasis.runtime.serving import sorted_prefixes
from krasis.runtime.serving.ids import TokenIds, shared_length
from krasis.runtime.serving.prefix_store import Layers, PrefixStore
from krasis.runtime.serving.sorted_prefixes import SortedPrefixes


def sequences(chance: random.Random, count: int, most: int = 12) -> Iterator[TokenIds]:
    """Of few different ids, so that many begin alike; an id of two bytes is after one of one."""
    for _ in range(count):
        yield np.array(chance.choices((0, 1, 2, 300), k=chance.randint(1, most)), dtype=np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_is_what_a_look_at_all_finds(seed: int) -> None:
    chance = random.Random(seed)
    kept = dict(enumerate(sequences(chance, 40)))
    found = SortedPrefixes()
    for key, tokens in kept.items():
        found.add(tokens, key)
    for key in chance.sample(sorted(kept), 15):
        found.remove(kept.pop(key), key)
    assert len(found) == len(kept)
    for tokens in sequences(chance, 60):
        length, key = found.nearest(tokens)
        assert length == max(shared_length(one, tokens) for one in kept.values())
        assert key == -1 if length == 0 else shared_length(kept[key], tokens) == length
        whole = [key for key, one in kept.items() if shared_length(one, tokens) == len(one)]
        beginnings = list(found.beginnings(tokens))
        assert sorted(key for _, key in beginnings) == sorted(whole)
        assert [size for size, _ in beginnings] == sorted((len(kept[key]) for key in whole), reverse=True)
        longer = [one for one in kept.values() if shared_length(one, tokens) == len(tokens)]
        assert found.has_beginning(tokens) == bool(longer)
    with pytest.raises(KeyError):
        found.remove(np.array([1], dtype=np.int64), 99)


def test_a_prompt_is_compared_with_few_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at each, for each waiting request and each step, took the engine's whole time under load."""
    rows: Layers = [(np.zeros((1, 2, 1)), np.zeros((1, 2, 1)))]
    store = PrefixStore(10**6)
    for first in range(2000):
        store.put(np.array([first, 7], dtype=np.int64), rows)
    num_compared = 0
    compare = sorted_prefixes._shared

    def counted(one: bytes, other: bytes) -> int:
        nonlocal num_compared
        num_compared += 1
        return compare(one, other)

    monkeypatch.setattr(sorted_prefixes, "_shared", counted)
    found = store.match(np.array([1234, 7, 8], dtype=np.int64))
    assert found is not None
    assert store.take(found.key)[0].tokens.tolist() == [1234, 7]
    assert store.covers(np.array([1234], dtype=np.int64))
    store.put(np.array([1234, 7, 9], dtype=np.int64), rows)
    assert len(store) == 2000
    assert num_compared < 20
