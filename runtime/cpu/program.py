"""Native calls as values: a ``Call`` is made once or, kept in a ``Program``, again and again.

The wrappers of ``kernels`` check shapes and look addresses up, which for one token takes as long as the
smaller kernels themselves. The calls of a token always use the same buffers, so they are checked once; what
changes, the positions and the sequences, they read from a ``Spans``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from krasis.formats.errors import NativeError
from krasis.formats.native import check

NativeFunction = Callable[..., int]


@dataclass(frozen=True, slots=True)
class Call:
    """One native call with all arguments resolved. keeps: what the arguments point into.

    num_pairs: (token, expert) pairs that it must run, which it adds to its program's count.
    """

    function: NativeFunction
    arguments: tuple[Any, ...]
    name: str
    keeps: tuple[object, ...] = ()
    num_pairs: int = 0

    def run(self) -> None:
        """Makes the call. Raises NativeError or ResourceError if it fails."""
        status = self.function(*self.arguments)
        if status:
            check(status, self.name)


class Program:
    """Calls in the order in which they were added. where: stands before the names of functions in errors."""

    __slots__ = ("_calls", "_executed", "_steps", "_where", "num_pairs")

    def __init__(self, where: str = "") -> None:
        self._where = f"{where}: " if where else ""
        self._calls: list[Call] = []
        self._steps: list[tuple[NativeFunction, tuple[Any, ...], str]] = []
        self._executed = ctypes.c_int64()
        self.num_pairs = 0

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls, in order."""
        return tuple(self._calls)

    @property
    def executed_address(self) -> int:
        """Of the int64 that ``krasis_moe`` adds the pairs to that it ran."""
        return ctypes.addressof(self._executed)

    @property
    def num_executed(self) -> int:
        """Pairs that the last run ran."""
        return self._executed.value

    def add(self, call: Call) -> None:
        """Appends a call."""
        self._calls.append(call)
        self._steps.append((call.function, call.arguments, self._where + call.name))
        self.num_pairs += call.num_pairs

    def run(self) -> None:
        """Makes all calls. Raises NativeError if one fails, or if a routed expert was left out."""
        self.run_some()
        if self._executed.value != self.num_pairs:
            raise NativeError(
                "not every routed expert was run",
                where=f"{self._where}krasis_moe",
                got=self._executed.value,
                limit=self.num_pairs,
            )

    def run_some(self) -> None:
        """As ``run``, for routings that leave experts out: the caller looks at ``num_executed``."""
        self._executed.value = 0
        for function, arguments, name in self._steps:
            status = function(*arguments)
            if status:
                check(status, name)

    def watch(self, wrap: Callable[[str, NativeFunction], NativeFunction]) -> None:
        """The functions of the calls so far are called through wrap(name, function): for profiles."""
        self._calls = [replace(call, function=wrap(call.name, call.function)) for call in self._calls]
        self._steps = [(call.function, call.arguments, self._where + call.name) for call in self._calls]
