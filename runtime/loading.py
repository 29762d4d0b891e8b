"""What a backend still loads in the background, for whoever shows it or would read from the same disk."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Loads(Protocol):
    """A backend that pins experts in host memory while the first prompt runs."""

    @property
    def is_loading(self) -> bool:
        """Whether it goes on; not after an error."""
        ...

    def load_progress(self) -> tuple[int, int]:
        """(bytes ready, bytes in all)."""
        ...


def is_loading(backend: object) -> bool:
    """Whether a backend, of whatever kind, still loads."""
    return isinstance(backend, Loads) and backend.is_loading
