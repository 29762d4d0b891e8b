"""One NVIDIA GPU through torch: its streams, events, graphs and caching allocator. See ``api.Device``.

Memory belongs to torch's allocator, which hands freed memory out again at once to work on the stream it was
allocated for. So every launch and copy tells it which stream uses a tensor (``record_stream``): dropping the
last reference to a tensor is safe at any time, as it is on the double. Streams do not wait for the default
stream, so nothing may run there: memory is initialised by launches.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import cast

import numpy as np
import torch

from krasis.formats.errors import OutOfDeviceMemoryError, ResourceError, UsageError
from krasis.runtime.device.api import Action, Event, Graph, Stream
from krasis.runtime.device.copies import check_copy
from krasis.runtime.device.library import check_status, cuda_library, last_error

_log = logging.getLogger(__name__)
_PAGE_BYTES = 4096


def release_library_memory(index: int) -> None:
    """Gives back what torch keeps of a GPU for no tensor: a cuBLAS workspace (32 MiB on an H100) for every
    stream that ever multiplied, also of engines that were closed, which would count as used; and freed
    blocks: weights would be put into them piece by piece, and what is left of a block that is partly used is
    lost.
    """
    torch.cuda.synchronize(index)
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


class CudaEvent:
    """A point in a stream. Waiting for it gives the CPU to other threads."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def synchronize(self) -> None:
        """Blocks the host until everything submitted before the point is done."""
        self.event.synchronize()

    def is_done(self) -> bool:
        """Whether it is, without blocking."""
        return bool(self.event.query())  # type: ignore[no-untyped-call, unused-ignore]


class CudaStream:
    """A stream that does not wait for the default one. handle: the cudaStream_t as an integer."""

    __slots__ = ("_device", "_pinned", "handle", "keep", "name", "stream")

    def __init__(self, device: torch.device, pinned: set[int], name: str) -> None:
        self.name = name
        self.stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call, unused-ignore]
        self.handle = int(self.stream.cuda_stream)
        self.keep: list[torch.Tensor] | None = None  # under capture: what the graph uses
        self._device = device
        self._pinned = pinned  # addresses of storages known to be pinned: asking the driver costs more

    def launch(
        self, name: str, action: Action, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Runs an action, which submits work. Raises OutOfDeviceMemoryError for its temporaries."""
        for tensors in (reads, writes):
            for tensor in tensors:
                self._use(tensor, name)
        try:
            with torch.cuda.stream(self.stream):
                action(self.handle)
            return
        except torch.cuda.OutOfMemoryError as error:
            words = str(error)
        # Out here the failed action's frames, and with them its temporaries, are gone.
        raise OutOfDeviceMemoryError("the GPU's memory is exhausted", where=name, got=words)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submits a copy. Raises UsageError for pageable host memory: such a copy would block."""
        if not source.numel() and not destination.numel():
            return
        check_copy(destination, source, (destination.is_cuda, source.is_cuda), self.name)
        self._use(destination, "copy")
        self._use(source, "copy")
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        """A point after everything submitted so far."""
        self._refuse_capture()
        event = torch.cuda.Event(enable_timing=False, blocking=True)  # type: ignore[no-untyped-call, unused-ignore]
        event.record(self.stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """What is submitted from here on runs after the event."""
        self._refuse_capture()
        if not isinstance(event, CudaEvent):
            raise UsageError("an event of another device", where=f"stream {self.name}")
        self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        """Blocks the host until the stream is empty."""
        self._refuse_capture()
        self.stream.synchronize()

    def _use(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device == self._device:
            tensor.record_stream(self.stream)
        elif tensor.numel() and not self._is_pinned(tensor):
            raise UsageError(
                "neither device memory nor pinned",
                where=f"{name} on stream {self.name}",
                got=f"a tensor {list(tensor.shape)} {tensor.dtype} on {tensor.device}",
                limit=f"memory of {self._device}, or pinned",
                hint="allocate it by Device.empty or Device.pinned, or register it",
            )
        if self.keep is not None:
            self.keep.append(tensor)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        return tensor.untyped_storage().data_ptr() in self._pinned or tensor.is_pinned()

    def _refuse_capture(self) -> None:
        if self.keep is not None:
            raise UsageError(
                "a captured stream has no events and waits for none", where=f"stream {self.name}"
            )


class CudaGraph:
    """A captured graph, and the tensors it uses."""

    __slots__ = ("_known_streams", "_tensors", "graph")

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._tensors = tensors
        self._known_streams: set[int] = set()

    def replay(self, stream: CudaStream) -> None:
        """Submits it to a stream."""
        if stream.handle not in self._known_streams:
            self._known_streams.add(stream.handle)
            for tensor in self._tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream.stream)
        with torch.cuda.stream(stream.stream):
            self.graph.replay()


class CudaDevice:
    """GPU number ``index`` of this process.

    vram_bytes: use no more than that on top of what the process holds already; None: no limit but the GPU's
    own. outside_bytes: of these, what is left to the CUDA context and to libraries: torch's limit for this
    process, by which it is done, counts what torch's allocator reserves. pinned_addresses: beginnings of what
    is known to be pinned. Raises ResourceError if there is no such GPU or nothing is left, NativeError if
    libkrasis_cuda is missing.
    """

    def __init__(self, index: int = 0, vram_bytes: int | None = None, outside_bytes: int = 0) -> None:
        _check_gpu(index)
        self.library: ctypes.CDLL = cuda_library()
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self._is_closed = False
        self._registered: dict[int, mmap.mmap] = {}
        self.pinned_addresses: set[int] = set()
        properties = torch.cuda.get_device_properties(index)
        all_bytes = int(properties.total_memory)
        self.total_bytes = all_bytes if vram_bytes is None else min(vram_bytes, all_bytes)
        self._is_capped = self.total_bytes < all_bytes
        self._usable_bytes = self.total_bytes - (outside_bytes if self._is_capped else 0)
        if self._usable_bytes <= 0:
            raise ResourceError(
                "the limit on the GPU's memory leaves nothing for the model",
                got=f"{self.total_bytes} bytes",
                limit=f"more than {outside_bytes} bytes, for CUDA's context and NCCL's buffers",
                hint="a larger --vram",
            )
        release_library_memory(index)
        # Of another engine of this process: not this device's.
        self._before_bytes = torch.cuda.memory_allocated(index)
        if self._is_capped:
            limit_bytes = min(self._usable_bytes + self._before_bytes, all_bytes)
            torch.cuda.set_per_process_memory_fraction(limit_bytes / all_bytes, index)
        self.description = (
            f"{properties.name} (cuda:{index}, compute capability {properties.major}.{properties.minor}, "
            f"{self.total_bytes / 2**30:.1f} GiB{' by setting' if self._is_capped else ''})"
        )
        _log.info("using %s", self.description)

    def stream(self, name: str) -> Stream:
        """A new stream."""
        return CudaStream(self.torch_device, self.pinned_addresses, name)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised device memory. Raises OutOfDeviceMemoryError."""
        try:
            return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            words = str(error)
        raise OutOfDeviceMemoryError(
            "the GPU's memory is exhausted", where=f"{dtype} {list(shape)}", got=words
        )

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised pinned host memory, whole pages, pinned until ``close``. Raises ResourceError."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        mapped_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        memory = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(memory, np.uint8)
        self._register(int(array.ctypes.data), mapped_bytes, memory)
        return torch.from_numpy(array)[:num_bytes].view(dtype).view(tuple(shape))

    def adopt(self, memory: mmap.mmap) -> torch.Tensor:
        """Its bytes, pinned until ``close``. Raises ResourceError."""
        array = np.frombuffer(memory, np.uint8)
        self._register(int(array.ctypes.data), len(array), memory)
        return torch.from_numpy(array)

    def free_bytes(self) -> int:
        """VRAM that can still be allocated: what the driver has left, and what torch keeps for later."""
        free_bytes, _ = torch.cuda.mem_get_info(self.index)
        allocated_bytes = torch.cuda.memory_allocated(self.index)
        free_bytes += torch.cuda.memory_reserved(self.index) - allocated_bytes
        return max(0, min(free_bytes, self._usable_bytes - (allocated_bytes - self._before_bytes)))

    def host_reads(self, *tensors: torch.Tensor) -> None:
        """Nothing: the double checks it."""

    def host_writes(self, *tensors: torch.Tensor) -> None:
        """Nothing: the double checks it."""

    def flags(self, count: int) -> torch.Tensor:
        """Pinned, zeroed words (int64 [count])."""
        return self.pinned((count,), torch.int64).zero_()

    def host_acquires(self, flag: torch.Tensor) -> None:
        """Nothing: the double checks it."""

    def host_releases(self, flag: torch.Tensor) -> None:
        """Nothing: the double checks it."""

    def serve(self, host: Callable[[], None]) -> None:
        """Runs host; the GPU works beside it."""
        host()

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[Graph]:
        """What is launched and copied on that stream inside the context is recorded instead of run.

        Waits for the device first. Other threads may go on using CUDA. Raises OutOfDeviceMemoryError.
        """
        owned = cast("CudaStream", stream)
        if owned.keep is not None:
            raise UsageError("the stream is being captured already", where=f"stream {owned.name}")
        self.synchronize()
        tensors: list[torch.Tensor] = []
        graph = CudaGraph(tensors)
        context = torch.cuda.graph(graph.graph, stream=owned.stream, capture_error_mode="thread_local")
        with context:
            owned.keep = tensors
            try:
                yield cast("Graph", graph)
            finally:
                owned.keep = None

    def synchronize(self) -> None:
        """Blocks the host until all streams are empty."""
        torch.cuda.synchronize(self.index)

    def close(self) -> None:
        """Waits, unpins all pinned memory and gives unused memory back. Calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.synchronize()
        unregister = self.library.krasis_cuda_host_unregister
        unregister.restype, unregister.argtypes = ctypes.c_int32, [ctypes.c_void_p]
        self.pinned_addresses.clear()
        while self._registered:
            address, _ = self._registered.popitem()
            with torch.cuda.device(self.index):
                status = unregister(address)
            if status:
                _log.warning(
                    "pinned memory was not released: %s", last_error(self.library) or f"status {status}"
                )
        if self._is_capped:
            torch.cuda.set_per_process_memory_fraction(1.0, self.index)
        torch.cuda.empty_cache()

    def _register(self, address: int, num_bytes: int, owner: mmap.mmap) -> None:
        register = self.library.krasis_cuda_host_register
        register.restype = ctypes.c_int32
        register.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        find = self.library.krasis_cuda_host_device_address
        find.restype, find.argtypes = ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
        on_device = ctypes.c_void_p()
        with torch.cuda.device(self.index):
            check_status(self.library, register(address, num_bytes, 0), f"pinning {num_bytes} bytes")
            self._registered[address] = owner
            check_status(self.library, find(address, ctypes.byref(on_device)), "address of pinned memory")
        if on_device.value != address:
            raise ResourceError(
                "pinned memory has another address on the device",
                where=self.description,
                got=on_device.value,
                limit=address,
                hint="this platform lacks unified addressing of registered memory, which Krasis needs",
            )
        self.pinned_addresses.add(address)


def _check_gpu(index: int) -> None:
    if torch.version.cuda is None:
        raise ResourceError(
            "this torch was built without CUDA",
            where=f"torch {torch.__version__}",
            hint="install a CUDA build of torch, or run on the CPU (--device cpu)",
        )
    if not torch.cuda.is_available():
        raise ResourceError(
            "torch finds no usable NVIDIA GPU",
            where=f"torch {torch.__version__}",
            hint="look at nvidia-smi and the driver's version, or run on the CPU (--device cpu)",
        )
    num_gpus = torch.cuda.device_count()
    if not 0 <= index < num_gpus:
        raise ResourceError("there is no such GPU", got=index, limit=f"0 to {num_gpus - 1}")
