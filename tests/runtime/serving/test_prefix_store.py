"""Prefixes in RAM: what matches, what goes first, what never goes."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import FormatError, KrasisError
from krasis.runtime.serving.ids import Ids, shared_length
from krasis.runtime.serving.prefix_store import Layers, Prefix, PrefixStore


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def layers(num_tokens: int, fill: float = 0.0) -> Layers:
    """Of 16 bytes a token."""
    rows = np.full((1, num_tokens, 1), fill, dtype=np.float64)
    return [(rows, rows.copy())]


def put(store: PrefixStore, *tokens: int, **options: bool) -> bool:
    return store.put(ids(*tokens), layers(len(tokens)), **options)


def lengths(store: PrefixStore) -> list[int]:
    return [len(one.tokens) for one in store]


def test_the_longest_match_wins_and_leaves_the_last_token() -> None:
    store = PrefixStore(1000)
    put(store, 1, 2, 3)
    put(store, 1, 2, 4, 5, 6)
    put(store, 9)
    found = store.match(ids(1, 2, 4, 5, 7, 8))
    assert found is not None
    assert found.length == 4
    assert store.take(found.key)[0].tokens.tolist() == [1, 2, 4, 5, 6]
    whole = store.match(ids(1, 2, 3))
    assert whole is not None
    assert whole.length == 2
    assert store.match(ids(8, 8)) is None
    assert store.match(ids(9)) is None


def test_the_least_recently_used_goes() -> None:
    store = PrefixStore(3 * 48)
    for first in (1, 2, 3):
        put(store, first, 0, 0)
    found = store.match(ids(1, 0, 0, 0))
    assert found is not None
    store.take(found.key)
    put(store, 4, 0, 0)
    assert [one.tokens[0] for one in store] == [3, 1, 4]
    assert (store.num_bytes, store.num_stored, store.num_evicted) == (144, 4, 1)


def test_what_a_queued_request_will_use_never_goes() -> None:
    store = PrefixStore(2 * 48)
    put(store, 1, 0, 0)
    put(store, 2, 0, 0)
    for name, first in (("a", 1), ("b", 2)):
        found = store.match(ids(first, 0, 0, 0))
        assert found is not None
        store.hold(name, found.key)
    assert not put(store, 3, 0, 0)
    store.release("a")
    assert put(store, 3, 0, 0)
    assert [one.tokens[0] for one in store] == [2, 3]
    store.release("never held")


def test_side_prefixes_go_first_and_make_nothing_else_go() -> None:
    store = PrefixStore(2 * 48)
    put(store, 1, 0, 0)
    put(store, 2, 0, 0, is_side=True)
    assert put(store, 3, 0, 0)
    assert [one.tokens[0] for one in store] == [1, 3]
    assert not put(store, 4, 0, 0, is_side=True)
    assert [one.tokens[0] for one in store] == [1, 3]


def test_a_longer_one_takes_the_place_of_its_beginnings() -> None:
    store = PrefixStore(1000)
    put(store, 1, 2)
    put(store, 1, 3)
    put(store, 1, 2, 3)
    assert lengths(store) == [2, 3]
    assert store.num_bytes == 80
    assert store.covers(ids(1, 2))
    assert not store.covers(ids(1, 2, 4))


def test_a_longer_one_that_has_no_room_leaves_its_beginnings() -> None:
    store = PrefixStore(100)
    put(store, 1, 2)
    assert not put(store, *range(1, 9))
    assert lengths(store) == [2]


def test_its_beginnings_make_room_before_others_do() -> None:
    store = PrefixStore(6 * 16)
    put(store, 9, 9)
    put(store, 1, 2, 3)
    put(store, 1, 2, 3, 4)
    assert [one.tokens.tolist() for one in store] == [[9, 9], [1, 2, 3, 4]]
    assert (store.num_evicted, store.num_bytes) == (0, 96)


def test_what_is_too_large_is_not_kept_and_nothing_goes_for_it() -> None:
    store = PrefixStore(100)
    put(store, 1, 2)
    assert not put(store, *range(100, 107))
    assert lengths(store) == [2]


def test_state_that_cannot_be_cut_matches_as_a_whole_only() -> None:
    store = PrefixStore(1000)
    put(store, 1, 2, 3, can_be_cut=False)
    assert store.match(ids(1, 2, 9, 9)) is None
    assert store.match(ids(1, 2, 3)) is None
    found = store.match(ids(1, 2, 3, 4))
    assert found is not None
    assert found.length == 3
    assert not store.covers(ids(1, 2))


class File:
    """A prefix on disk."""

    num_bytes = 48

    def __init__(self, is_sound: bool = True) -> None:
        self.is_sound, self.num_read = is_sound, 0

    def read(self) -> Layers:
        self.num_read += 1
        if not self.is_sound:
            raise FormatError("damaged")
        return layers(3, 5.0)


def test_what_leaves_ram_may_lie_on_disk_and_comes_back() -> None:
    files: dict[int, File] = {}

    def spill(prefix: Prefix) -> File:
        assert prefix.layers is not None
        return files.setdefault(int(prefix.tokens[0]), File())

    store = PrefixStore(48, spill)
    put(store, 1, 0, 0)
    put(store, 2, 0, 0)
    assert (store.num_bytes, len(store), list(files)) == (48, 2, [1])
    found = store.match(ids(1, 0, 0, 0))
    assert found is not None
    _, state = store.take(found.key)
    assert state[0][0][0, 0, 0] == 5.0
    assert (files[1].num_read, list(files), store.num_bytes) == (1, [1, 2], 48)
    store.take(found.key)
    assert files[1].num_read == 1  # it is in RAM again


def test_a_damaged_file_is_forgotten() -> None:
    store = PrefixStore(1000)
    store.add_file(ids(1, 2, 3), File(is_sound=False))
    found = store.match(ids(1, 2, 3, 4))
    assert found is not None
    store.hold("a", found.key)
    with pytest.raises(KrasisError):
        store.take(found.key)
    assert store.match(ids(1, 2, 3, 4)) is None
    store.release("a")
    assert len(store) == store.num_bytes == 0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((), (), 0),
        ((), (1,), 0),
        ((1,), (2,), 0),
        ((1, 2, 3), (1, 2, 3), 3),
        ((1, 2, 3), (1, 2, 4), 2),
        (range(1000), [*range(999), 0, 0], 999),
        (range(64), range(65), 64),
        (range(65), [*range(64), 1], 64),
        ([*range(63), 1], range(65), 63),
    ],
)
def test_what_two_sequences_begin_with(one: list[int], other: list[int], expected: int) -> None:
    assert shared_length(ids(*one), ids(*other)) == expected


def test_ids_grow() -> None:
    grown = Ids([1, 2])
    for token in range(300):
        grown.append(token)
    assert len(grown) == 302
    assert grown.first(3).tolist() == [1, 2, 0]
    assert grown.between(300, 400).tolist() == [298, 299]
