"""What all wrappers of kernels share: a native function, its arguments, and the memory it touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from krasis.runtime.device.api import Device, Stream
from krasis.runtime.device.library import check_status
from krasis.runtime.gpu.kernels.native import cuda_prototype

Tensors = Sequence[torch.Tensor]


def present(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


class Launcher:
    """Submits native functions of a device's library. They are bound when first called."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._functions: dict[str, Callable[..., int]] = {}

    def function(self, name: str) -> Callable[..., int]:
        """``krasis_cuda_`` + name. Raises NativeError if the library lacks it."""
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = cuda_prototype(self.device.library, name)
        return found

    def submit(
        self, stream: Stream, name: str, arguments: tuple[Any, ...], reads: Tensors, writes: Tensors
    ) -> None:
        """Launches a function on arguments and the stream. Structs go as ``byref``, which keeps them."""
        action = partial(self._run, self.function(name), name, arguments)
        stream.launch(name, action, reads=reads, writes=writes)

    def fill(self, stream: Stream, tensor: torch.Tensor, value: float = 0) -> None:
        """Sets every element."""

        def action(_: int) -> None:
            tensor.fill_(value)

        stream.launch("fill", action, reads=(), writes=(tensor,))

    def _run(self, function: Callable[..., int], name: str, arguments: tuple[Any, ...], handle: int) -> None:
        status = function(*arguments, handle)
        if status:
            check_status(self.device.library, status, f"krasis_cuda_{name}")
