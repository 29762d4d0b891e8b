"""Token ids that are none are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.text.token_ids import checked_ids

VOCAB = 300


@pytest.mark.parametrize(
    "ids", [[1, 2, 299], (0,), range(3), [np.int32(7), 1], np.array([4, 5], np.uint8), [], np.array([])]
)
def test_whole_numbers_of_every_kind(ids: Any) -> None:
    found = checked_ids(ids, VOCAB)
    assert found.dtype == np.int64
    assert found.tolist() == [int(one) for one in ids]


def test_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    assert checked_ids(torch.tensor([1, 2]), VOCAB).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([-1, 5], r"outside the vocabulary \(got -1; limit 300\)"),
        ([5, -1, 900], r"got -1;"),
        ([5, 300], r"got 300;"),
        ([2**70], r"got 1180591620717411303424;"),
        ([10**5000], r"thousands of digits"),
        (np.array([3, -4]), r"got -4;"),
        (np.array([2**63], np.uint64), r"got 9223372036854775808;"),
        ([1.7], r"no whole number \(got float 1.7\)"),
        ([2.0], r"got float 2.0"),
        ([True, 5], r"got bool True"),
        ([np.bool_(True)], r"no whole number"),
        (["5"], r"got str '5'"),
        ([None], r"got NoneType None"),
        ([[1]], r"got list \[1\]"),
        (np.array([1.5]), r"got float 1.5 of float64"),
        (np.array([True]), r"got bool True of bool"),
        (np.array([[1]]), r"an array of shape \(1, 1\)"),
        (b"abc", r"got bytes"),
        ("abc", r"got str"),
        (5, r"in a list \(got int\)"),
        (None, r"in a list \(got NoneType\)"),
    ],
)
def test_what_is_no_id_is_named(ids: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        checked_ids(ids, VOCAB)
