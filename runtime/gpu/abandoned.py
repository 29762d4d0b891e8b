"""A pass of several ranks that one of them cannot go on with: it makes the exchanges that are left, with
nothing in them, so that the others come to the pass's end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.channel_delta import GpuChannelDelta
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.short_conv import GpuShortConv
from krasis.runtime.gpu.blocks.table import Blocks
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Chunk
from krasis.runtime.gpu.exchange import exchange_rows
from krasis.runtime.gpu.kernels.head import gathers
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.gpu.prefill import kv_parts
from krasis.runtime.gpu.prefill_delta import exchange_delta


def make_exchanges(
    model: GpuModel, blocks: Blocks, parallel: Parallel, chunk: Chunk, buffers: Buffers, num_made: int
) -> None:
    """Makes a pass's exchanges but the first num_made; returns when they are done. What other ranks get is 0,
    and of keys and values whatever lies there. Raises OutOfDeviceMemoryError, torch.OutOfMemoryError if not
    even that is possible.
    """
    stream = model.stream
    calls: list[Callable[[], None]] = []
    for block in (block for layer in blocks for block in layer):
        if isinstance(block, GpuAttention | GpuLatentAttention):
            parts = kv_parts(model.cache, chunk, block.layer)
            calls += [partial(parallel.share_kv, stream, one, buffers.shared_kv) for one in parts]
        elif isinstance(block, GpuGatedDelta | GpuChannelDelta | GpuShortConv):
            calls += exchange_delta(stream, parallel, buffers, block, chunk.num_tokens, chunk.own)
        elif isinstance(block, GpuExperts):
            calls += exchange_rows(stream, parallel, buffers, chunk.num_tokens)
    if gathers(chunk):
        calls.append(partial(parallel.gather_tokens, stream, buffers.x, buffers.gathered_x, chunk.num_tokens))
    _clear(model, buffers)
    for call in calls[num_made:]:
        call()
    stream.synchronize()


def _clear(model: GpuModel, buffers: Buffers) -> None:
    """What is sent, and what sums are added to: reading it must not be an error, nor make one elsewhere."""
    sent = (buffers.hidden, buffers.x, buffers.ids, buffers.weights, buffers.delta_gates, buffers.partial)
    tensors = [tensor for tensor in sent if tensor is not None and tensor.numel()]

    def clear(_: int) -> None:
        for tensor in tensors:
            tensor.zero_()

    model.stream.launch("clear what is sent", clear, reads=(), writes=tensors)
