"""Dense products over many rows: INT8 weights as 16-bit floats in a scratch buffer, then the library's.

The native kernel multiplies by exact codes and scales each sum in fp32. Here a weight is code * scale rounded
to 16 bits (relative error up to 2^-9 in bfloat16, 2^-12 in float16), as cuBLAS wants it; sums stay fp32 and
are rounded once on both paths, also where a float32 residual is added. So the two differ by about as much as
rounding the activations did, and a number of rows always takes the same path: results do not depend on
timing.
"""

from __future__ import annotations

import itertools
import logging

import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 64 * 2**20
"""Three quarters hold weights at a time: rows enough for the library's largest tiles, few enough to stay in
an L2 cache. The rest holds fp32 sums at a time, which a pass of its own adds to a float32 residual: not
every torch that multiplies 16-bit matrices into float32 also adds to one. The library has a workspace
besides, which torch allocates (32 MiB on sm_90).
"""

ALIGNMENT = 256


KNOWN = {(9, 0): 1024}
"""Tokens from which the library's product is taken, by compute capability; scripts/measure_many_rows.py
measures them. (9, 0), an H100: the library's path passes the native kernel at 1024 tokens (0.95 to 1.15 times
its speed, launches included) and is 1.8 to 2.9 times faster at 4096.
"""

UNKNOWN = 4096
"""An estimate: there unpacking costs a tenth of the product at most (3 bytes of traffic a weight against
8192 flops).
"""


def least_tokens_of(device: Device) -> int | None:
    """The threshold of a device's compute capability; None, which is never, on the double."""
    if device.torch_device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device.torch_device)
    found = KNOWN.get(capability)
    if found is None:
        logger.info("compute capability %d.%d was not measured: %d tokens", *capability, UNKNOWN)
    return found or UNKNOWN


class ManyRows:
    """Chooses the path of dense products. scratch: uint8, on the device; None: always the native kernel.
    least_tokens: from which on the library's product is taken; None: as measured for the device.
    """

    def __init__(
        self, kernels: GpuKernels, scratch: torch.Tensor | None, least_tokens: int | None = None
    ) -> None:
        self._kernels, self._scratch = kernels, scratch
        self._least_tokens = least_tokens_of(kernels.device) if least_tokens is None else least_tokens

    def takes(self, num_tokens: int) -> bool:
        """Whether the library's product is taken for so many rows."""
        least = self._least_tokens
        return self._scratch is not None and least is not None and num_tokens >= least

    def dense_product(
        self,
        stream: Stream,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        """out [T, n] = (residual +) x [T, k] x W^T; arguments as ``GpuKernels.int8_gemm`` takes them."""
        scratch = self._scratch
        if scratch is None or not self.takes(len(x)):
            self._kernels.int8_gemm(stream, x, codes, scales, out, residual=residual)
            return
        n, k = out.shape[1], x.shape[1]
        weight_bytes = scratch.nbytes * 3 // 4 // ALIGNMENT * ALIGNMENT
        sums = scratch[weight_bytes : scratch.nbytes // 4 * 4].view(torch.float32)
        for begin, end in weight_pieces(n, k, weight_bytes):
            weight = scratch[: 2 * (end - begin) * k].view(x.dtype).view(end - begin, k)
            self._kernels.int8_dequant(
                stream, codes[begin // STRIP_ROWS : end // STRIP_ROWS], scales[begin:end], weight
            )
            added = None if residual is None else residual[:, begin:end]
            _launch(stream, x, weight, out[:, begin:end], added, sums)


def weight_pieces(n: int, k: int, scratch_bytes: int) -> list[tuple[int, int]]:
    """Ranges of the n rows of a weight that fit in scratch, even in size: a small last one would run badly.

    Raises NativeError if not even a tile does.
    """
    tiles, most = -(-n // STRIP_ROWS), scratch_bytes // (2 * k * STRIP_ROWS)
    if most == 0:
        raise NativeError("scratch holds no tile of weights", got=scratch_bytes, limit=2 * k * STRIP_ROWS)
    count = -(-tiles // most)
    cuts = [tiles * index // count * STRIP_ROWS for index in range(count)] + [n]
    return list(itertools.pairwise(cuts))


def _launch(
    stream: Stream,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    def action(_: int) -> None:
        multiply(x, weight, out, residual, sums)

    if residual is None:
        stream.launch("matmul", action, reads=(x, weight), writes=(out,))
    else:
        stream.launch("matmul", action, reads=(x, weight, residual), writes=(out, sums))


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    sums: torch.Tensor,
) -> None:
    """out [T, n] = (residual +) x [T, k] x weight [n, k]^T with fp32 sums; x and weight 16-bit, out of their
    type or float32, residual like out; it may be out. sums: float32, scratch, room for n of them or more.
    """
    transposed = weight.t()
    if not x.is_cuda:  # the double: torch's CPU products of 16-bit floats round where they please
        total = x.float() @ transposed.float()
        out.copy_(total if residual is None else total.add_(residual))
    elif residual is not None:
        _add_product(x, transposed, out, residual, sums)
    elif out.dtype == x.dtype:
        torch.mm(x, transposed, out=out)
    else:
        torch.mm(x, transposed, out_dtype=out.dtype, out=out)


def _add_product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, residual: torch.Tensor, sums: torch.Tensor
) -> None:
    """In pieces of tokens, as many as the sums have room for.

    Not addmm: on an H100 it was seen to round a bfloat16 product before it adds the residual.
    """
    n = out.shape[1]
    rows = len(sums) // n
    if rows == 0:
        raise NativeError("no room for the sums of a token", got=len(sums), limit=n)
    for begin in range(0, len(x), rows):
        end = min(len(x), begin + rows)
        total = sums[: (end - begin) * n].view(end - begin, n)
        torch.mm(x[begin:end], weight, out_dtype=total.dtype, out=total)
        torch.add(residual[begin:end], total, out=out[begin:end])
