"""Activations as the int8 kernels read them."""

from __future__ import annotations

import ctypes

from krasis.formats.errors import NativeError
from krasis.formats.layouts.cpu_tiles import BLOCK_K
from krasis.runtime.cpu.native import ActsStruct
from krasis.runtime.cpu.native_arrays import F32, I8, I32, Array, aligned_empty, out_pointer, shape_2d

_MAX_VIEWS = 64


class Acts:
    """Activations as int8 per block of 32: ``q`` int8 [T, k], ``scale`` float32, ``sum`` int32 [T, k/32]."""

    __slots__ = ("_struct", "_views", "address", "k", "q", "ref", "scale", "sum", "tokens")

    def __init__(self, q: Array, scale: Array, sums: Array) -> None:
        self.tokens, self.k = shape_2d(q, "acts.q")
        if self.k <= 0 or self.k % BLOCK_K:
            raise NativeError("k is not a multiple of the block", where="acts", got=self.k, limit=BLOCK_K)
        blocks = (self.tokens, self.k // BLOCK_K)
        self.q, self.scale, self.sum = q, scale, sums
        self._struct = ActsStruct(
            out_pointer(q, q.shape, I8, "acts.q"),
            out_pointer(scale, blocks, F32, "acts.scale"),
            out_pointer(sums, blocks, I32, "acts.sum"),
            self.tokens,
            self.k,
        )
        self.ref = ctypes.byref(self._struct)
        self.address = ctypes.addressof(self._struct)
        self._views: dict[int, Acts] = {}

    @classmethod
    def allocate(cls, max_tokens: int, k: int) -> Acts:
        """Uninitialised buffers for max_tokens tokens of k elements, 64-byte aligned."""
        blocks = (max_tokens, k // BLOCK_K)
        return cls(aligned_empty((max_tokens, k), I8), aligned_empty(blocks, F32), aligned_empty(blocks, I32))

    def by_head(self, num_heads: int) -> Acts:
        """The same with a row for each of num_heads equal parts of a row (the same object each time)."""
        found = self._views.get(-num_heads)
        if found is None:
            rows, k = self.tokens * num_heads, self.k // num_heads
            scale, sums = (one.reshape(rows, k // BLOCK_K) for one in (self.scale, self.sum))
            found = self._views[-num_heads] = Acts(self.q.reshape(rows, k), scale, sums)
        return found

    def view(self, tokens: int) -> Acts:
        """The first ``tokens`` rows of the same buffers (the same object when asked again)."""
        if tokens == self.tokens:
            return self
        found = self._views.get(tokens)
        if found is None:
            if not 0 <= tokens <= self.tokens:
                raise NativeError(
                    "more tokens than the buffer holds", where="acts", got=tokens, limit=self.tokens
                )
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._views[tokens] = Acts(self.q[:tokens], self.scale[:tokens], self.sum[:tokens])
        return found
