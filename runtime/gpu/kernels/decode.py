"""Wrappers of the kernels of decode: the flags that hand work to and fro."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from functools import partial

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import F32, I64, pointer, require, vector_pointer
from krasis.runtime.gpu.kernels.launcher import Launcher
from krasis.runtime.gpu.kernels.native import SEND_PIECES, ReceiveArgs, SendArgs

_WORD = (1,)


class DecodeKernels(Launcher):
    """flag: one of ``Device.flags``. epoch int64 [1]: a counter in device memory. timeouts int64 [1]."""

    def advance(self, stream: Stream, epoch: torch.Tensor) -> None:
        """epoch += 1."""
        arguments = (pointer(epoch, _WORD, I64, "advance.epoch"),)
        self.submit(stream, "advance", arguments, (epoch,), (epoch,))

    def signal(self, stream: Stream, flag: torch.Tensor, epoch: torch.Tensor) -> None:
        """flag = epoch, once everything before it on the stream is visible to the host."""
        arguments = (pointer(flag, _WORD, I64, "signal.flag"), pointer(epoch, _WORD, I64, "signal.epoch"))
        self.submit(stream, "signal", arguments, (epoch,), (flag,))

    def wait(
        self,
        stream: Stream,
        flag: torch.Tensor,
        epoch: torch.Tensor,
        timeout_ns: int,
        timeouts: torch.Tensor,
    ) -> None:
        """Waits until flag >= epoch.

        Gives up after timeout_ns, and at once if timeouts is not 0: then timeouts += 1.
        """
        arguments = (
            pointer(flag, _WORD, I64, "wait.flag"),
            pointer(epoch, _WORD, I64, "wait.epoch"),
            timeout_ns,
            pointer(timeouts, _WORD, I64, "wait.timeouts"),
        )
        self.submit(stream, "wait", arguments, (flag, epoch, timeouts), (timeouts,))

    def add(self, stream: Stream, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """hidden += x; float32 of one shape, a multiple of 4 elements; x may be pinned."""
        shape = tuple(hidden.shape)
        count = hidden.numel()
        require(count % 4 == 0, "not a multiple of 4", "add.hidden", count, 4)
        arguments = (
            vector_pointer(hidden, shape, F32, "add.hidden"),
            vector_pointer(x, shape, F32, "add.x"),
            count,
        )
        if count:
            self.submit(stream, "add", arguments, (hidden, x), (hidden,))

    def send(
        self,
        stream: Stream,
        pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
        flag: torch.Tensor,
        epoch: torch.Tensor,
    ) -> None:
        """Copies up to 4 (pinned destination, source), then flag = epoch: one launch, for kilobytes."""
        args = self._send_args(pieces, flag, epoch)
        reads, writes = _ends(pieces)
        self.submit(stream, "send", (byref(args),), (*reads, epoch), (*writes, flag))

    def fetch(
        self,
        stream: Stream,
        pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
        flag: torch.Tensor,
        epoch: torch.Tensor,
    ) -> None:
        """Copies up to 4 (destination, pinned source) by the kernel of ``send``, whose flag nobody waits for:
        unlike a copy it waits for no other one that is on its way to the device."""
        args = self._send_args(pieces, flag, epoch)
        reads, writes = _ends(pieces)
        run = partial(self._run, self.function("send"), "send", (byref(args),))
        stream.launch("fetch", run, reads=(*reads, epoch), writes=(*writes, flag))

    def _send_args(
        self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], flag: torch.Tensor, epoch: torch.Tensor
    ) -> SendArgs:
        require(len(pieces) <= SEND_PIECES, "too many pieces", "send", len(pieces), SEND_PIECES)
        args = SendArgs(
            flag=pointer(flag, _WORD, I64, "send.flag"), epoch=pointer(epoch, _WORD, I64, "send.epoch")
        )
        for index, (destination, source) in enumerate(pieces):
            shape, dtypes = tuple(source.shape), (source.dtype,)
            args.sources[index] = pointer(source, shape, dtypes, "send.source")
            args.destinations[index] = pointer(destination, shape, dtypes, "send.destination")
            args.num_bytes[index] = source.nbytes
            if source.nbytes % 4 or source.data_ptr() % 4 or destination.data_ptr() % 4:
                raise NativeError("not whole words of 4 bytes", where="send", got=f"{source.nbytes} bytes")
        return args

    def receive(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        x: torch.Tensor,
        flag: torch.Tensor,
        epoch: torch.Tensor,
        timeout_ns: int,
        timeouts: torch.Tensor,
        tag: int,
    ) -> None:
        """Waits until flag >= epoch, then hidden += x (float32, x pinned): one launch, for kilobytes.

        Gives up as ``wait`` does, adding tag (not 0) to timeouts instead of 1, and hidden then stays.
        """
        shape, count = tuple(hidden.shape), hidden.numel()
        require(count % 4 == 0, "not a multiple of 4", "receive.hidden", count, 4)
        require(tag > 0, "tag must be positive", "receive", tag, 1)
        args = ReceiveArgs(
            pointer(flag, _WORD, I64, "receive.flag"),
            pointer(epoch, _WORD, I64, "receive.epoch"),
            timeout_ns,
            pointer(timeouts, _WORD, I64, "receive.timeouts"),
            tag,
            vector_pointer(hidden, shape, F32, "receive.hidden"),
            vector_pointer(x, shape, F32, "receive.x"),
            count,
        )
        reads = (x, hidden, epoch, flag, timeouts)
        self.submit(stream, "receive", (byref(args),), reads, (hidden, timeouts))


def _ends(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What copies read, and what they write."""
    return [source for _, source in pieces], [destination for destination, _ in pieces]
