"""Whether a launcher started this process as one of several ranks of our own job.

RANK and WORLD_SIZE alone do not say so: cluster launchers set them for every program of a job, and children
of a rank inherit them. They count if torchrun started this very process, or if ``KRASIS_JOIN=1`` says so.
Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

JOIN = "KRASIS_JOIN"
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "torch/distributed/run.py")
# Between torchrun and us, these run what they were given; another program would be the rank itself.
_WRAPPERS = frozenset(["sh", "bash", "dash", "zsh", "env", "nice", "numactl", "taskset", "timeout", "stdbuf"])
_MAX_DEPTH = 8


def is_launched_rank(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether torchrun (or, with ``KRASIS_JOIN=1``, whoever set its variables) started this process as one of
    several ranks. root: stands for the file system's root, for tests.
    """
    if _number(environment, "WORLD_SIZE") <= 1 or _number(environment, "RANK") < 0:
        return False
    return environment.get(JOIN) == "1" or _torchrun_above(root)


def is_worker_rank(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether this process is one of several ranks and not the first: it must not read or print anything."""
    return _number(environment, "RANK") > 0 and is_launched_rank(environment, root)


def ignored_note(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str:
    """One sentence if a launcher's variables speak of several ranks and are not heeded; else empty."""
    usual = {"RANK": ("", "0"), "WORLD_SIZE": ("", "1")}
    odd = [name for name in usual if environment.get(name, "") not in usual[name]]
    if not odd or is_launched_rank(environment, root):
        return ""
    set_ones = " and ".join(name for name in usual if environment.get(name))
    verb = "are" if " and " in set_ones else "is"
    return (
        f"{set_ones} of a job's launcher {verb} ignored, because torchrun did not start this process: "
        f"--gpus N takes several GPUs of this machine, {JOIN}=1 joins the job"
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    """A variable's number; -1 for none."""
    text = environment.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1


def _torchrun_above(root: Path) -> bool:
    """Whether the nearest ancestor that is no shell or wrapper is torchrun."""
    pid = os.getppid()
    for _ in range(_MAX_DEPTH):
        words = _command(root, pid)
        if any(word.endswith(_TORCHRUN) for word in words[:4]):
            return True
        if not words or words[0].rpartition("/")[2].lstrip("-") not in _WRAPPERS:
            return False
        pid = _parent(root, pid)
    return False


def _command(root: Path, pid: int) -> list[str]:
    try:
        data = (root / f"proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode("utf-8", "replace") for word in data.split(b"\0") if word]


def _parent(root: Path, pid: int) -> int:
    try:
        # pid (name, which may hold anything) state ppid ...
        return int((root / f"proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
