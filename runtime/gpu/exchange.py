"""What ranks exchange in a layer with experts: rows of x, who chose which experts, and sums.

Of many rows x goes to the others on a stream beside the compute stream, as soon as it is there, and the
choice behind it: meanwhile this one's router and shared expert compute. Nothing else of a layer could: keys,
values and sums are needed by the next thing that there is to do, and half a chunk at a time would read every
expert twice and leave more of their last blocks of rows empty (20 rows an expert touched: of 10,000 tokens on
2 GPUs 3 % more of what the experts take, as much as the exchange).

What it gains, by bytes, at Qwen3-235B's shape with 10,000 tokens on two H200, whose layer takes 9.2 ms with
all experts in VRAM: x is 41 MB, 0.14 ms at 300 GB/s, of which the norm in f32, the router's product (5
GFLOP in f32) and the choice hide 0.1 ms: 1 %. With a shared expert (GLM-4.6's: 0.24 TFLOP, 0.4 ms) all of it
is hidden. Where experts are streamed (11.6 ms a layer) their copies go on under an exchange anyway: nothing,
unless both share a link. No GPU has run it.

All ranks' exchanges have one order, whichever stream they are on, and each waits for the one before: so ranks
may differ in it.
"""

from __future__ import annotations

from collections.abc import Callable

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.parallel import Parallel

BESIDE_BYTES = 4 << 20
"""From so many bytes of x on that a rank receives, 13 us at 300 GB/s: below, the host's time for the events
that order two streams is as long."""


class RowExchange:
    """That of one pass. stream: what computes; beside: another one."""

    def __init__(
        self, stream: Stream, beside: Stream | None, parallel: Parallel, buffers: Buffers, num_tokens: int
    ) -> None:
        self._stream, self._parallel, self._buffers = stream, parallel, buffers
        self._num_tokens, self._num_sent = num_tokens, 0
        received = buffers.gathered_x.nbytes - buffers.x.nbytes
        self._beside = beside if received >= BESIDE_BYTES else None

    def send_x(self) -> None:
        """x will not change before the experts have run."""
        if self._beside is not None:
            self._send(self._beside, 1)

    def send_choice(self) -> None:
        """Nor will ids and weights. Does nothing unless x was sent before: it goes first on all ranks."""
        if self._beside is not None and self._num_sent == 1:
            self._send(self._beside, 3)

    def gather(self) -> None:
        """What is submitted to the compute stream from here on finds all ranks' rows."""
        if self._beside is not None and self._num_sent:
            self._send(self._beside, 3)
            self._stream.wait(self._beside.record())
        else:
            self._send(self._stream, 3)
        self._num_sent = 0

    def add(self) -> None:
        """hidden += the sum of all ranks' partial rows; of one rank's, the experts have added it."""
        exchange_rows(self._stream, self._parallel, self._buffers, self._num_tokens)[3]()

    def _send(self, stream: Stream, end: int) -> None:
        """The calls up to end that were not made."""
        if self._num_sent == end:
            return
        if stream is not self._stream:
            stream.wait(self._stream.record())
        calls = exchange_rows(stream, self._parallel, self._buffers, self._num_tokens)
        for call in calls[self._num_sent : end]:
            call()
        self._num_sent = end


def exchange_rows(
    stream: Stream, parallel: Parallel, buffers: Buffers, num_tokens: int
) -> tuple[Callable[[], None], ...]:
    """What ranks exchange in a layer with experts, in order: three before the experts, one behind them."""
    b, count = buffers, num_tokens

    def add() -> None:
        if b.partial is not None:
            parallel.scatter_sum(stream, b.partial, b.hidden, count, scratch=b.received)

    return (
        lambda: parallel.gather_tokens(stream, b.x, b.gathered_x, count),
        lambda: parallel.gather_tokens(stream, b.weights, b.gathered_weights, count),
        lambda: parallel.gather_ids(stream, b.ids, b.gathered_ids, count),
        add,
    )
