"""The memory of the device's double: poisoned, counted, guarded, and looked up by address."""

from __future__ import annotations

import math
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import OutOfDeviceMemoryError, UsageError
from krasis.runtime.device.ordering import Access, History, Ranges, byte_ranges

ALIGNMENT_BYTES = 512
GUARD_BYTES = 64
POISON = 0xCD
_GUARD = 0xA5


class Allocation:
    """Bytes at an address, with their history. kind: ``device``, ``pinned`` or ``flag``."""

    __slots__ = ("__weakref__", "address", "guarded", "history", "kind", "label", "num_bytes")

    def __init__(self, address: int, num_bytes: int, kind: str, label: str, write: Access | None) -> None:
        self.address, self.num_bytes, self.kind, self.label = address, num_bytes, kind, label
        self.history = History(num_bytes, write)
        self.guarded: npt.NDArray[np.uint8] | None = None

    @property
    def is_device(self) -> bool:
        """Whether it is VRAM rather than pinned host memory."""
        return self.kind == "device"


class DoubleMemory:
    """All allocations of one double. total_bytes: of the VRAM it pretends to have."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.peak_bytes = 0
        self._used_bytes = 0
        # Finalizers only append here: they may run on any thread and in the middle of anything.
        self._freed: deque[tuple[Allocation, int]] = deque()
        self.damaged: list[str] = []
        self._addresses: list[int] = []
        self._by_address: dict[int, Allocation] = {}
        self._num_made = 0

    def __iter__(self) -> Iterator[Allocation]:
        self._sweep()
        return iter([self._by_address[address] for address in self._addresses])

    @property
    def used_bytes(self) -> int:
        """VRAM of the tensors that live."""
        self._sweep()
        return self._used_bytes

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Poisoned memory, freed with the last tensor on it. Raises OutOfDeviceMemoryError."""
        if any(size < 0 for size in shape):
            raise UsageError("negative size", where="device memory", got=list(shape))
        num_bytes = math.prod(shape) * dtype.itemsize
        label = f"{kind} memory #{self._num_made} ({list(shape)} {str(dtype).removeprefix('torch.')})"
        counted = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if kind == "device" else 0
        used_bytes = self.used_bytes
        if used_bytes + counted > self.total_bytes:
            raise OutOfDeviceMemoryError(
                "the device's memory is exhausted",
                where=label,
                got=f"{counted} bytes more than {used_bytes}",
                limit=f"{self.total_bytes} bytes",
            )
        self._num_made += 1
        self._used_bytes += counted
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)
        raw = np.full(num_bytes + 2 * GUARD_BYTES + ALIGNMENT_BYTES, _GUARD, np.uint8)
        begin = GUARD_BYTES + -(int(raw.ctypes.data) + GUARD_BYTES) % ALIGNMENT_BYTES
        array = raw[begin : begin + num_bytes]
        if num_bytes:
            allocation = Allocation(int(array.ctypes.data), num_bytes, kind, label, None)
            allocation.guarded = raw[begin - GUARD_BYTES : begin + num_bytes + GUARD_BYTES].view()
            self._add(allocation)
            # The tensor's storage owns `array`, and nobody else does: it dies with the last view.
            weakref.finalize(array, self._freed.append, (allocation, counted)).atexit = False
        array.fill(1 if dtype is torch.bool else POISON)
        flat = torch.from_numpy(array).view(dtype)
        if num_bytes and dtype.is_floating_point:
            flat.fill_(math.nan)
        return flat.view(tuple(shape))

    def register(self, tensor: torch.Tensor, label: str, write: Access | None) -> None:
        """Makes ordinary host memory pinned. Raises UsageError if part of it is known already."""
        self._sweep()
        begin, end = _whole(tensor)
        following = bisect_right(self._addresses, begin)
        before = self._by_address[self._addresses[following - 1]] if following else None
        overlaps = before is not None and before.address + before.num_bytes > begin
        if overlaps or (following < len(self._addresses) and self._addresses[following] < end):
            raise UsageError("memory is registered already", where=label)
        self._add(Allocation(begin, end - begin, "pinned", label, write))

    def registered(self, tensor: torch.Tensor) -> Allocation:
        """What ``register`` made of that memory. Raises UsageError if it was not registered."""
        begin, end = _whole(tensor)
        found = self._by_address.get(begin)
        if found is None or found.num_bytes != end - begin or found.guarded is not None:
            raise UsageError("memory is not registered", got=f"{end - begin} bytes at {begin:#x}")
        return found

    def unregister(self, allocation: Allocation) -> None:
        """Forgets registered memory."""
        self._remove(allocation)

    def find(self, tensor: torch.Tensor, what: str) -> tuple[Allocation, Ranges]:
        """The allocation a view lies in and the offsets it covers. Raises UsageError for other memory."""
        ranges = byte_ranges(tensor)
        found = self.lookup(ranges[0][0], ranges[-1][1]) if ranges else None
        if found is None:
            raise UsageError(
                "neither device memory nor pinned",
                where=what,
                got=f"a tensor {list(tensor.shape)} {tensor.dtype} of ordinary memory",
                hint="allocate it by Device.empty or Device.pinned, or register it",
            )
        return found, [(begin - found.address, end - found.address) for begin, end in ranges]

    def lookup(self, begin: int, end: int) -> Allocation | None:
        """The allocation that holds all these addresses."""
        self._sweep()
        index = bisect_right(self._addresses, begin) - 1
        if index < 0:
            return None
        found = self._by_address[self._addresses[index]]
        return found if end <= found.address + found.num_bytes else None

    def check_guards(self) -> None:
        """Notes in ``damaged`` the allocations around which something was written."""
        for allocation in self:
            self._check_guard(allocation)

    def _check_guard(self, allocation: Allocation) -> None:
        raw = allocation.guarded
        if raw is not None and not (
            (raw[:GUARD_BYTES] == _GUARD).all() and (raw[-GUARD_BYTES:] == _GUARD).all()
        ):
            self.damaged.append(allocation.label)
            allocation.guarded = None

    def _sweep(self) -> None:
        while self._freed:
            allocation, counted = self._freed.popleft()
            self._check_guard(allocation)
            self._used_bytes -= counted
            self._remove(allocation)

    def _add(self, allocation: Allocation) -> None:
        insort(self._addresses, allocation.address)
        self._by_address[allocation.address] = allocation

    def _remove(self, allocation: Allocation) -> None:
        if self._by_address.get(allocation.address) is allocation:
            del self._by_address[allocation.address]
            del self._addresses[bisect_right(self._addresses, allocation.address) - 1]


def _whole(tensor: torch.Tensor) -> tuple[int, int]:
    ranges = byte_ranges(tensor)
    if len(ranges) != 1:
        raise UsageError("only contiguous memory can be registered", got=list(tensor.shape))
    return ranges[0]
