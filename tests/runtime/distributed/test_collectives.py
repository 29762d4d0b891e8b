"""What ranks exchange, on 1 to 4 processes, against the same layer computed by NumPy in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("rank_cases", Path(__file__).parent / "rank_cases.py")
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def outcomes(fork_ranks):
    folder = fork_ranks(*(f"layer:{size}" for size in SIZES))

    def of(num_ranks: int, rank: int, dtype: str):
        return np.load(folder / f"layer_{num_ranks}" / f"{rank}_{dtype}.npz")

    return of


def expected_layer(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """hidden + the weighted sum of the experts' products, and the sum of their absolute values."""
    p = {name: array.astype(np.float64) for name, array in cases.problem(lengths).items()}
    ids = p["ids"].astype(int)
    products = np.einsum("tk,th,tkhn->tkn", p["weights"], p["x"], p["experts"][ids])
    return p["hidden"] + products.sum(1), np.abs(products).sum(1)


@pytest.mark.parametrize("lengths", cases.CHUNKS, ids=cases.name_of)
@pytest.mark.parametrize("num_ranks", SIZES)
def test_a_mixture_layer(outcomes, num_ranks: int, lengths: tuple[int, ...]) -> None:
    """16-bit sums: every rank's part is rounded once, so the error is at most 2**-9 of the parts' absolute
    sum."""
    expected, size = expected_layer(lengths)
    for dtype, relative in (("float32", 2**-20), ("bfloat16", 2**-8)):
        for rank in range(num_ranks):
            found = outcomes(num_ranks, rank, dtype)[f"{cases.name_of(lengths)}_hidden"]
            assert (np.abs(found - expected) <= relative * size + 1e-5).all()


@pytest.mark.parametrize("num_ranks", SIZES)
def test_all_ranks_have_the_same_bits(outcomes, num_ranks: int) -> None:
    for dtype in ("float32", "bfloat16"):
        first = outcomes(num_ranks, 0, dtype)
        for rank in range(1, num_ranks):
            other = outcomes(num_ranks, rank, dtype)
            for name in first.files:
                if not name.endswith("_ids"):
                    np.testing.assert_array_equal(other[name], first[name], err_msg=name)


@pytest.mark.parametrize("lengths", cases.CHUNKS, ids=cases.name_of)
@pytest.mark.parametrize("num_ranks", SIZES)
def test_each_expert_of_a_token_is_one_ranks(outcomes, num_ranks: int, lengths: tuple[int, ...]) -> None:
    ids = cases.problem(lengths)["ids"]
    found = np.stack(
        [outcomes(num_ranks, rank, "float32")[f"{cases.name_of(lengths)}_ids"] for rank in range(num_ranks)]
    )
    assert ((found >= 0).sum(0) <= 1).all()
    routed = found.max(0)
    assert sorted(map(tuple, routed[(routed >= 0).all(1)])) == sorted(map(tuple, ids))
    assert (routed < 0).all(1).sum() == len(routed) - sum(lengths)


@pytest.mark.parametrize("lengths", cases.CHUNKS, ids=cases.name_of)
@pytest.mark.parametrize("num_ranks", SIZES)
def test_every_rank_gets_all_keys_and_values(outcomes, num_ranks: int, lengths: tuple[int, ...]) -> None:
    p, label = cases.problem(lengths), cases.name_of(lengths)
    for rank in range(num_ranks):
        found = outcomes(num_ranks, rank, "float32")
        for index, length in enumerate(lengths):
            end = cases.start_of(index) + length
            for name in ("keys", "values"):
                np.testing.assert_array_equal(found[f"{label}_{name}_{index}"], p[name][index, :, :end])
