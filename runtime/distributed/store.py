"""torch.distributed's key-value store, with the types that torch's stubs leave out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch.distributed as dist

CONNECT_S = 120.0  # for all processes of a job to be started and to find rank 0


class Store(Protocol):
    """A client; every method raises RuntimeError when the server is gone. Waiting locks the client."""

    def set(self, key: str, value: str) -> None:
        """Writes."""
        ...

    def get(self, key: str) -> bytes:
        """Reads; waits for the key."""
        ...

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        ...

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Blocks until they are."""
        ...

    def delete_key(self, key: str) -> bool:
        """Forgets a key."""
        ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Writes if the key holds what is expected ("": nothing); gives what it holds then."""
        ...


def tcp_store(address: str, port: int, *, host: bool, listen_fd: int | None = None) -> Store:
    """A client of the store at an address. host: also runs it, as long as the object lives; on a given
    listening socket, which it takes over."""
    make: Any = dist.TCPStore  # type: ignore[attr-defined]  # not in torch's stubs
    return cast(
        "Store",
        make(
            address,
            port,
            is_master=host,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_S),
            master_listen_fd=listen_fd,
        ),
    )


def prefixed(prefix: str, store: Store) -> Store:
    """The same store, every key behind a prefix."""
    make: Any = dist.PrefixStore  # type: ignore[attr-defined]  # not in torch's stubs
    return cast("Store", make(prefix, store))
