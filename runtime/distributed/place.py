"""Which rank this process is, and how it reaches the others: the words torchrun uses, also for our own
workers. Torch is imported when a store is wanted, not before: other ranks are started first."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krasis.formats.errors import UsageError
from krasis.runtime.distributed.errors import RankError

if TYPE_CHECKING:
    from krasis.runtime.distributed.store import Store


@dataclass(frozen=True, slots=True)
class Place:
    """One rank. local_rank: on its host, and its GPU there; num_local_ranks: of them. address, port: of the
    store that all ranks meet at. hosts_store: whether this process runs it. prefix: of this job's keys."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int
    address: str
    port: int
    hosts_store: bool
    prefix: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """From RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and
        our launcher set them. Raises UsageError for one that is missing or impossible."""
        rank = _number(environment, "RANK", 0)
        num_ranks = _number(environment, "WORLD_SIZE", 1)
        local_rank = _number(environment, "LOCAL_RANK", 0)
        num_local_ranks = _number(environment, "LOCAL_WORLD_SIZE", 1, default=1)
        if rank >= num_ranks:
            raise UsageError("this rank is not one of the job's", where="RANK", got=rank, limit=num_ranks - 1)
        if "MASTER_ADDR" not in environment:
            raise UsageError("no address of rank 0", where="MASTER_ADDR", hint="start with torchrun")
        return cls(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            num_local_ranks=num_local_ranks,
            address=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT", 1),
            hosts_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            # A job that torchrun restarts must not read what the failed one left in its store.
            prefix=f"krasis/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )

    def environment(self) -> dict[str, str]:
        """What ``from_environment`` reads back, without hosting the store, whatever a launcher has set."""
        return {
            "TORCHELASTIC_RESTART_COUNT": self.prefix.rpartition("/")[2],
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.num_local_ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def connect(self) -> Store:
        """A new client of the store (one a thread: a waiting client is locked). Raises RankError if it
        cannot."""
        from krasis.runtime.distributed.store import prefixed, tcp_store

        try:
            store = tcp_store(self.address, self.port, host=False)
        except RuntimeError as error:
            raise RankError(
                "rank 0 cannot be reached",
                where=f"rank {self.rank}",
                got=f"{self.address}:{self.port}, {_first_line(error)}",
                hint="are all ranks started, with the same MASTER_ADDR and MASTER_PORT?",
            ) from error
        return prefixed(self.prefix, store)


def host_store(place: Place) -> Store:
    """Runs the store that all ranks meet at. Keep what it returns as long as the job runs."""
    from krasis.runtime.distributed.store import tcp_store

    return tcp_store(place.address, place.port, host=True)


def listen_locally(num_ranks: int) -> socket.socket:
    """A socket for ``host_local_store``, on a free port that only this host can reach."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(num_ranks * 4)
    return listener


def local_place(num_ranks: int, rank: int, listener: socket.socket) -> Place:
    """A rank of a job on this host."""
    port: int = listener.getsockname()[1]
    return Place(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, rank == 0, "krasis/0")


def host_local_store(listener: socket.socket) -> Store:
    """Runs a store on a socket, which it takes over. Keep what it returns as long as the job runs."""
    from krasis.runtime.distributed.store import tcp_store

    address, port = listener.getsockname()
    return tcp_store(address, port, host=True, listen_fd=listener.detach())


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _number(environment: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        value = int(text)
    except ValueError as error:
        raise UsageError("not a number", where=name, got=repr(text), hint="start with torchrun") from error
    if value < least:
        raise UsageError("too small", where=name, got=value, limit=f"at least {least}")
    return value
