"""A layer's values handed from GPU to CPU and back, for one token: pinned buffers, and flags that only grow.

A token is an epoch. In layer l the device sends the normed row and the routing (``send``: copy, then flag l
of the host holds the epoch), the host computes into a result buffer and sets flag l of the device, and the
device adds the result to its residual stream (``receive``: wait for the flag, then add). All of it happens
inside one captured graph and one loop on the host; nothing sleeps.

Why few buffers do: the device sends layer l + 1 only after it has received layer l, for which the host has
read all of layer l. A result buffer may be read by the device until the next layer's send, so there are two:
while the device may still read the one, the host clears the other.
"""

from __future__ import annotations

import ctypes

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.native import prototype
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.planning.shape import AnyModel, shape_of

NUM_RESULTS = 2
FLAG_WORDS = 16  # 128 bytes: no two flags in one line of either side's cache
GIVE_UP = 2**63 - 1  # an epoch that never comes: every wait is over


class Handover:
    """The buffers and flags of one token, or of a few rows, at a time. Layers: those that have experts.

    normed f32 [rows, hidden], ids i32 and weights f32 [rows, top_k]: pinned, what the device sent last;
    results: pinned f32 [rows, hidden], by layer % 2. timeout_s: how long either side waits for the other in a
    layer. max_rows: tokens at once.
    """

    def __init__(
        self, device: Device, kernels: GpuKernels, model: AnyModel, timeout_s: float, max_rows: int = 1
    ) -> None:
        a = shape_of(model)
        self.device, self._kernels = device, kernels
        self.num_layers = a.num_expert_layers
        self._numbers = a.expert_layers  # by which errors name a layer
        self.timeout_ns = int(timeout_s * 1e9)
        self.normed = device.pinned((max_rows, a.expert_width), torch.float32)
        self.ids = device.pinned((max_rows, a.num_experts_per_token), torch.int32)
        self.weights = device.pinned((max_rows, a.num_experts_per_token), torch.float32)
        self.results = [device.pinned((max_rows, a.expert_width), torch.float32) for _ in range(NUM_RESULTS)]
        self._host_flags = device.flags(self.num_layers * FLAG_WORDS)
        self._device_flags = device.flags(self.num_layers * FLAG_WORDS)
        self._device_epoch = device.empty((1,), torch.int64)
        self._timeouts = device.pinned((1,), torch.int64)
        self._store = prototype("krasis_store_flag")
        self.epoch = ctypes.c_uint64(0)  # of the token under way

    def host_flag(self, layer: int) -> torch.Tensor:
        """i64 [1]: the epoch the device has sent this layer in."""
        return self._host_flags[layer * FLAG_WORDS : layer * FLAG_WORDS + 1]

    def device_flag(self, layer: int) -> torch.Tensor:
        """i64 [1]: the epoch the host has answered this layer in."""
        return self._device_flags[layer * FLAG_WORDS : layer * FLAG_WORDS + 1]

    def name_of(self, layer: int) -> str:
        """A layer with experts, as errors name it."""
        return f"layer {self._numbers[layer]}"

    # ---- launches, to be captured --------------------------------------------------------------------------

    def begin(self, stream: Stream) -> None:
        """The next token begins on the device."""
        self._kernels.advance(stream, self._device_epoch)

    def send(
        self, stream: Stream, layer: int, normed: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """To the host: rows [T, hidden] f32 and the experts they want there [T, top_k] (-1: none)."""
        count = len(normed)
        pieces = ((self.normed[:count], normed), (self.ids[:count], ids), (self.weights[:count], weights))
        self._kernels.send(stream, pieces, self.host_flag(layer), self._device_epoch)

    def receive(self, stream: Stream, layer: int, hidden: torch.Tensor) -> None:
        """hidden [T, hidden] f32 += the host's result."""
        result = self.results[layer % NUM_RESULTS][: len(hidden)]
        flag, epoch = self.device_flag(layer), self._device_epoch
        self._kernels.receive(
            stream, hidden, result, flag, epoch, self.timeout_ns, self._timeouts, tag=layer + 1
        )

    # ---- the host ------------------------------------------------------------------------------------------

    def reset(self, stream: Stream) -> None:
        """Before the first token, and after an error with the device idle: the next token begins afresh."""
        self.device.host_writes(self._timeouts, *self.results)
        for tensor in (self._timeouts, *self.results):
            tensor.zero_()
        for layer in range(self.num_layers):
            for flag in (self.host_flag(layer), self.device_flag(layer)):
                self._store(flag.data_ptr(), self.epoch)
        epoch, value = self._device_epoch, self.epoch.value

        def set_epoch(_: int) -> None:
            epoch.fill_(value)

        stream.launch("set epoch", set_epoch, reads=(), writes=(epoch,))

    def answer(self, num_layers: int) -> None:
        """Ends the device's waits in the first layers: the token is lost, but the GPU comes to rest."""
        for layer in range(num_layers):
            self.device.host_releases(self.device_flag(layer))
            self._store(self.device_flag(layer).data_ptr(), GIVE_UP)

    def check(self) -> None:
        """After a token, with the stream synchronised. Raises NativeError if the device waited in vain."""
        self.device.host_reads(self._timeouts)
        tag = int(self._timeouts[0])
        if tag:
            raise NativeError(
                "the GPU waited in vain for the CPU's experts",
                where=self.name_of(tag - 1),
                limit=f"{self.timeout_ns / 1e9:g} s",
                hint="is the machine overloaded, or the process stopped?",
            )
