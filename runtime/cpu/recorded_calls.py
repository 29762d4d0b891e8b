"""A sequence of native calls with all arguments resolved, to be made again for every token.

The wrappers of ``kernels`` check shapes and look addresses up, which for one token takes as long as the
smaller kernels themselves. One token always uses the same buffers, so its calls are checked once, while they
are recorded, and then only the position changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from krasis.formats.errors import NativeError
from krasis.formats.native import Pool, check
from krasis.runtime.cpu.kernels import FUNCTION_ATTRIBUTES, Kernels, NativeFunction
from krasis.runtime.cpu.native import AttentionArgs, MoeArgs, QkvArgs
from krasis.runtime.cpu.native_arrays import Array

# Functions whose arguments lie in a record of Kernels, which every call fills anew.
_RECORDS = {
    "krasis_qk_norm_rope_store": "_qkv_args",
    "krasis_attention": "_attention_args",
    "krasis_moe": "_moe_args",
}


class RecordedCalls(Kernels):
    """Kernels whose methods check and record instead of computing; ``replay`` then computes.

    The arrays given must live as long as the recording, and stay where they are.
    """

    __slots__ = ("_calls", "_expected", "_num_executed", "_positioned")

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._calls: list[tuple[NativeFunction, tuple[Any, ...], str]] = []
        self._positioned: list[QkvArgs | AttentionArgs] = []
        self._num_executed = ctypes.c_int64()
        self._expected = 0
        for name, attribute in FUNCTION_ATTRIBUTES.items():
            function = getattr(self, attribute)
            if name in _RECORDS:
                setattr(self, attribute, self._record_copier(function, name, getattr(self, _RECORDS[name])))
            else:
                setattr(self, attribute, self._recorder(function, name))

    def watch(self, wrap: Callable[[str, NativeFunction], NativeFunction]) -> None:
        """As ``Kernels.watch``, for the calls recorded so far."""
        self._calls = [(wrap(name, function), arguments, name) for function, arguments, name in self._calls]

    def moe(self, *args: Any, **kwargs: Any) -> int:
        """As ``Kernels.moe``; the count is what the replay must reach."""
        super().moe(*args, **kwargs)
        ids: Array = args[4]
        self._expected += ids.size
        return ids.size

    def replay(self, position: int) -> None:
        """Makes all calls for a token at position. Raises NativeError if a routed expert was left out."""
        for record in self._positioned:
            record.start = position
        self._num_executed.value = 0
        for function, arguments, name in self._calls:
            status = function(*arguments)
            if status:
                check(status, name)
        if self._num_executed.value != self._expected:
            raise NativeError(
                "not every routed expert was run",
                where="krasis_moe",
                got=self._num_executed.value,
                limit=self._expected,
            )

    def _recorder(self, function: NativeFunction, name: str) -> NativeFunction:
        def record(*arguments: Any) -> int:
            self._calls.append((function, arguments, name))
            return 0

        return record

    def _record_copier(
        self, function: NativeFunction, name: str, shared: QkvArgs | AttentionArgs | MoeArgs
    ) -> NativeFunction:
        """The wrappers fill one record again and again: every call keeps a copy of its own."""

        def record(handle: int, _: object) -> int:
            copy = type(shared).from_buffer_copy(shared)
            if isinstance(copy, MoeArgs):
                copy.executed = ctypes.addressof(self._num_executed)
            else:
                self._positioned.append(copy)
            self._calls.append((function, (handle, ctypes.byref(copy)), name))
            return 0

        return record
