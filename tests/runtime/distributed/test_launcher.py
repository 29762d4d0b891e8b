"""Who counts as a rank of our own job, and what is said of variables that do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from krasis.runtime.distributed.launcher import ignored_note, is_launched_rank, is_worker_rank

RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
LEFT_BY_TORCHRUN = {**RANKS, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}


def ancestors(root: Path, *commands: list[str]) -> Path:
    """A /proc in which this process's parent, its parent and so on run these."""
    pid = os.getppid()
    for depth, words in enumerate(commands):
        folder = root / f"proc/{pid if not depth else 900_000 + depth}"
        folder.mkdir(parents=True)
        (folder / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
        (folder / "stat").write_text(f"1 (odd ) name) S {900_001 + depth} 1 1")
    return root


TORCHRUN = ["/opt/venv/bin/python3", "/opt/venv/bin/torchrun", "--nnodes", "2", "krasis-run"]
MODULE = ["python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "krasis-run"]


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        ([TORCHRUN], True),
        ([MODULE], True),
        ([["bash", "job.sh"], ["numactl", "-m", "0", "bash"], TORCHRUN], True),
        ([["python", "train.py"], TORCHRUN], False),  # the rank is the script that started us
        ([["bash", "-c", "krasis-run"], ["python", "train.py"], TORCHRUN], False),
        ([["slurmstepd: [1.0]"]], False),
        ([["bash"]], False),
        ([], False),
    ],
)
def test_only_what_torchrun_itself_started_is_a_rank(
    tmp_path: Path, commands: list[list[str]], expected: bool
) -> None:
    root = ancestors(tmp_path, *commands)
    assert is_launched_rank(LEFT_BY_TORCHRUN, root) is expected
    assert is_worker_rank(LEFT_BY_TORCHRUN, root) is expected
    assert not is_worker_rank({**LEFT_BY_TORCHRUN, "RANK": "0"}, root)
    assert bool(ignored_note(LEFT_BY_TORCHRUN, root)) is not expected


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "-2"},
        {"WORLD_SIZE": "\u00b2"},
        {"RANK": ""},
        {"RANK": "x"},
    ],
)
def test_impossible_numbers_are_no_job(tmp_path: Path, changes: dict[str, str]) -> None:
    root = ancestors(tmp_path, TORCHRUN)
    assert not is_launched_rank({**RANKS, **changes, "KRASIS_JOIN": "1"}, root)
    assert not is_worker_rank({**RANKS, **changes}, root)


def test_any_launcher_can_be_joined_by_name(tmp_path: Path) -> None:
    assert is_launched_rank({**RANKS, "KRASIS_JOIN": "1"}, tmp_path)
    assert not is_launched_rank({**RANKS, "KRASIS_JOIN": "0"}, tmp_path)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"RANK": "", "WORLD_SIZE": ""}, ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE of a job's launcher are ignored"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK and WORLD_SIZE of a job's launcher are ignored"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE of a job's launcher is ignored"),
    ],
)
def test_what_is_ignored_is_said_in_one_sentence(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    note = ignored_note(environment, tmp_path)
    assert note.startswith(words)
    assert bool(note) is bool(words)
    if words:
        assert "--gpus N" in note
        assert "KRASIS_JOIN=1" in note
