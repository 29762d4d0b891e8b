"""A rank that fails, dies or stops ends the job on all ranks, within seconds, and says who it was."""

from __future__ import annotations

from pathlib import Path

import pytest

LIMIT_S = 60.0  # on a busy machine; 1 to 4 s on a quiet one, and for ever if ranks hang


@pytest.fixture(scope="module")
def folder(fork_ranks) -> Path:
    return fork_ranks("killed:2", "killed:4", "raising:3", "silent:2", "differing:3", check=False)


def notes(folder: Path) -> dict[int, tuple[float, str]]:
    """(seconds, error) of each rank that lived to note one."""
    found = {}
    for path in folder.glob("*.txt"):
        seconds, _, error = path.read_text().partition(" ")
        found[int(path.stem)] = (float(seconds), error)
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_killed_rank_is_an_error_not_a_hang(folder: Path, num_ranks: int) -> None:
    found = notes(folder / f"killed_{num_ranks}")
    assert 0 in found
    assert num_ranks - 1 not in found
    for seconds, error in found.values():
        assert seconds < LIMIT_S
        assert error.startswith("RankError")


def test_an_error_of_a_rank_reaches_all(folder: Path) -> None:
    found = notes(folder / "raising_3")
    assert sorted(found) == [0, 1, 2]
    assert found[2][1] == "ResourceError: test: no room (got 7)"
    for rank in (0, 1):
        seconds, error = found[rank]
        assert seconds < LIMIT_S
        assert error == "RankError: rank 2, prefill: test: no room (got 7)"


def test_a_rank_that_falls_silent_is_noticed(folder: Path) -> None:
    seconds, error = notes(folder / "silent_2")[0]
    assert error == "RankError: rank 1 has not been heard of for 2 s"
    assert seconds < LIMIT_S


def test_ranks_with_different_settings_refuse_to_start(folder: Path) -> None:
    texts = [(folder / "differing_3" / f"{rank}.txt").read_text() for rank in range(3)]
    assert texts == ["rank 1: ranks differ in settings (got b; limit a)"] * 3
