"""Runs a case of ``rank_cases.py`` on several ranks that are forks of this process: torch is imported once.

    python fork_ranks.py FOLDER CASE:NUM_RANKS [CASE:NUM_RANKS ...]

Each rank calls case(place, folder). Ends with the number of ranks that failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import rank_cases

from krasis.runtime.distributed.place import host_local_store, listen_locally, local_place


def start(rank: int, num_ranks: int, listener, case, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        place = local_place(num_ranks, rank, listener)
        store = host_local_store(listener) if rank == 0 else None
        case(place, folder)
        code = 0
        del store
    except BaseException:  # noqa: BLE001  # the child of a fork must end here, whatever happened
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(folder: Path, name: str, num_ranks: int) -> int:
    """How many ranks failed; what they leave lies in FOLDER/CASE_NUM_RANKS."""
    own = folder / f"{name}_{num_ranks}"
    own.mkdir()
    case = getattr(rank_cases, name)
    listener = listen_locally(num_ranks)
    pids = [start(rank, num_ranks, listener, case, own) for rank in range(num_ranks)]
    listener.close()
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


def main(folder: Path, runs: list[str]) -> int:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return sum(run(folder, name, int(size)) for name, size in (one.split(":") for one in runs))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
