"""Pinning of host memory that already exists: by CUDA, or, for the device's double, by taking note of it."""

from __future__ import annotations

import ctypes
import resource
from typing import Protocol, runtime_checkable

import torch

from krasis.formats.errors import ResourceError
from krasis.runtime.device.api import Device
from krasis.runtime.device.library import check_status


class RegistrationError(ResourceError):
    """The system refused to pin memory. ``got`` has its words."""


class Registrar(Protocol):
    """Pins and unpins memory; called from several threads. name: for logs."""

    name: str

    def register(self, memory: torch.Tensor, *, read_only: bool) -> None:
        """Pins uint8 memory whose address and size are multiples of 4096. Raises RegistrationError."""
        ...

    def unregister(self, memory: torch.Tensor) -> None:
        """Unpins what ``register`` got. Raises RegistrationError."""
        ...


@runtime_checkable
class KnowsPinned(Protocol):
    """A device that asks the driver only about memory whose address is not among these."""

    pinned_addresses: set[int]


@runtime_checkable
class NotesHostMemory(Protocol):
    """A device that only needs to be told what is pinned: the double."""

    def register_host(self, memory: torch.Tensor, *, read_only: bool) -> None:
        """From here on views of the bytes count as pinned."""
        ...

    def unregister_host(self, memory: torch.Tensor) -> None:
        """No longer."""
        ...


class CudaRegistrar:
    """cudaHostRegister of libkrasis_cuda, in the primary context of one GPU (pinned for all GPUs of the
    process).
    """

    name = "cudaHostRegister"

    def __init__(
        self, library: ctypes.CDLL, torch_device: torch.device, known: set[int] | None = None
    ) -> None:
        """known: addresses that the device need not ask the driver about, which is slow while others pin."""
        self._library, self._device = library, torch_device
        self._known = set() if known is None else known
        library.krasis_cuda_host_register.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        library.krasis_cuda_host_register.restype = ctypes.c_int32
        library.krasis_cuda_host_unregister.argtypes = [ctypes.c_void_p]
        library.krasis_cuda_host_unregister.restype = ctypes.c_int32

    def register(self, memory: torch.Tensor, *, read_only: bool) -> None:
        """See ``Registrar``."""
        # A thread begins on GPU 0: without this every rank would open a context there.
        with torch.cuda.device(self._device):
            status = self._library.krasis_cuda_host_register(
                memory.data_ptr(), memory.numel(), int(read_only)
            )
            self._check(status, "krasis_cuda_host_register", memory)
        self._known.add(memory.data_ptr())

    def unregister(self, memory: torch.Tensor) -> None:
        """See ``Registrar``."""
        self._known.discard(memory.data_ptr())
        with torch.cuda.device(self._device):
            status = self._library.krasis_cuda_host_unregister(memory.data_ptr())
            self._check(status, "krasis_cuda_host_unregister", memory)

    def _check(self, status: int, function: str, memory: torch.Tensor) -> None:
        try:
            check_status(self._library, status, function)
        except ResourceError as error:
            raise RegistrationError(
                "CUDA refused to pin host memory",
                where=function,
                got=f"{error.what}, {memory.numel()} bytes",
                hint=locked_memory_hint(memory.numel()),
            ) from error


class DoubleRegistrar:
    """Tells the device's double what counts as pinned."""

    name = "device double"

    def __init__(self, device: NotesHostMemory) -> None:
        self._device = device

    def register(self, memory: torch.Tensor, *, read_only: bool) -> None:
        """See ``Registrar``."""
        self._device.register_host(memory, read_only=read_only)

    def unregister(self, memory: torch.Tensor) -> None:
        """See ``Registrar``."""
        self._device.unregister_host(memory)


def registrar_of(device: Device) -> Registrar:
    """How memory is pinned for this device."""
    if isinstance(device, NotesHostMemory):
        return DoubleRegistrar(device)
    known = device.pinned_addresses if isinstance(device, KnowsPinned) else None
    return CudaRegistrar(device.library, device.torch_device, known)


def locked_memory_hint(num_bytes: int) -> str:
    """What to do if the limit on locked memory may be the reason; empty if it cannot be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= num_bytes:
        return ""
    return f"locked memory is limited to {soft} bytes (ulimit -l); in a container, --ulimit memlock=-1"
