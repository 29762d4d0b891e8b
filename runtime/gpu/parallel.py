"""What a prefill pass asks of the other ranks.

Each rank has all dense weights and the KV cache of all tokens, some of the chunk's tokens (``own_segments``)
and some of each layer's experts. One layer of a chunk of T tokens, with P = rows_per_rank(T):

1. norm, qkv, rotary embedding and the KV store of the own tokens, segment by segment; ``share_kv``: now the
   slots of all sequences hold the whole chunk on every rank; attention and output projection of the own
   tokens
2. norm, router and top-k of the own tokens; ``gather_tokens`` of the 16-bit activations and of the weights,
   and ``gather_ids``, which leaves -1 where another rank has the expert
3. the own experts over all gathered rows; their weighted sum into ``partial``, in f32 or 16 bits
4. ``scatter_sum``: hidden of the own tokens += the sum of all ranks' partial rows

A layer of the gated delta rule has other exchanges than 1: ``gather_tokens`` of the 16-bit activations and of
the gates; then each rank computes all tokens, and has the state that all of them leave.

Local buffers have P rows: the own tokens in rising order, then at most one row of padding, which need not be
initialised (a rank may have no token at all: T < R). Gathered buffers have R * P rows, rank 0's block first,
which is not the order of the tokens: nothing between 2 and 4 minds. The last token of a chunk of one sequence
is always rank 0's, at its last own row.

Every call is one launch on the given stream. All ranks must make the same calls in the same order.

Bytes. At Qwen3-235B's shape a rank receives (R-1)/R of T * 4096 * 2 bytes a layer for the activations, as
much for the partial sums in 16 bits, a quarter of it for keys and values. With 10,000 tokens and 3 GPUs that
is 0.12 GB a layer beside 0.42 GB of experts over the same link; f32 sums would add 0.055 GB a layer, an
eighth of the expert bytes. An expert's output is rounded to 16 bits anyway (relative 2**-9 for bf16); its
partial sum is rounded once more, and the sum over ranks is in f32 and in the order of the ranks, so no hop of
a ring adds an error. Hence 16-bit sums in long passes, and f32 in short ones, where they cost nothing:
``planning/sums.py`` draws the line, and all ranks the same. What 16 bits cost, on the double in f16 (128
experts, 2 to 4 ranks), in the norm of one rank's logits: prompts differ by 2.0e-4 to 5.3e-4, tokens that the
CPU's experts decode behind them by up to 2.4e-3, where an int8 step was rounded apart; with f32 sums all by 0
to 3.5e-4. As many bits in another form (int16 and a scale a row) do not help: any rounding moves some step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.partition import Partition, Segment


@dataclass(frozen=True, slots=True)
class KvPart:
    """Positions [begin, end) of one layer's keys and values [num_kv_heads, capacity, head_dim] of a
    sequence."""

    keys: torch.Tensor
    values: torch.Tensor
    begin: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Positions."""
        return self.end - self.begin

    def rows(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_kv_heads, end - begin, head_dim] of its tokens [begin, end)."""
        first, last = self.begin + begin, self.begin + end
        return self.keys[:, first:last], self.values[:, first:last]


class Parallel(Protocol):
    """This rank among all.

    rank: 0 has the last token and makes the logits. num_local_ranks: ranks on this host, which share its
    memory. partition: who has which tokens. first_expert, num_experts: this rank's experts of every layer.
    num_exchanges: calls so far that all ranks have to make.
    """

    rank: int
    num_ranks: int
    num_local_ranks: int
    partition: Partition
    first_expert: int
    num_experts: int
    num_exchanges: int

    def own_segments(self, lengths: Sequence[int]) -> tuple[Segment, ...]:
        """[begin, end) of this rank's tokens of a chunk whose sequences have so many, in rising order, each
        in one sequence: maybe none."""
        ...

    def own_tokens(self, num_tokens: int) -> int:
        """How many tokens that is."""
        ...

    def rows_per_rank(self, num_tokens: int) -> int:
        """P: rows of a local buffer."""
        ...

    def gathered_rows(self, num_tokens: int) -> int:
        """R * P: rows of a gathered buffer; num_tokens for one rank."""
        ...

    def gather_tokens(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """full [R * P, k] = all ranks' local [P, k], both contiguous, of any dtype. Padding becomes 0.

        With one rank the two must be the same memory, and nothing is done.
        """
        ...

    def gather_ids(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """As ``gather_tokens``, for expert ids i32: -1 for padding and for experts of other ranks."""
        ...

    def scatter_sum(
        self,
        stream: Stream,
        partial: torch.Tensor,
        hidden: torch.Tensor,
        num_tokens: int,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """hidden [P, k] f32 += the sum over ranks, in their order and in f32, of partial [R * P, k], which is
        f32 or 16-bit, and the same on all.

        scratch: memory like partial that may be overwritten; None: allocated for the call. Padding rows of
        hidden become 0. Not for one rank (NativeError): it adds to hidden directly.
        """
        ...

    def share_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """One layer's keys and values of the chunk's tokens, a part for each of its sequences, in order:
        each rank wrote those of its own tokens and gets the others.

        scratch: memory of any shape that may be overwritten, of P + R * P tokens' keys and values; where it
        is too small they are allocated.
        """
        ...

    def send_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """Copies one layer's parts, of one shape but for the positions, from rank 0 to all: what decode
        wrote there alone.

        scratch: memory that may be overwritten, as much on every rank: they go through it, in several steps
        where it does not hold all; None: allocated.
        """
        ...

    def restore_order(
        self, stream: Stream, gathered: torch.Tensor, ordered: torch.Tensor, lengths: Sequence[int]
    ) -> None:
        """ordered [T, k] = gathered [R * P, k] in the order of the tokens, without padding, of a chunk whose
        sequences have so many. With one rank the two must be the same memory. Local: no rank waits for
        another."""
        ...

    def agree(self, value: int) -> int:
        """The smallest value of all ranks; blocks the host. For batch sizes and the like."""
        ...


class SingleRank:
    """One rank with everything: a ``Parallel`` that does nothing."""

    def __init__(self, num_experts: int) -> None:
        self.rank, self.num_ranks, self.num_local_ranks = 0, 1, 1
        self.partition = Partition(1)
        self.first_expert, self.num_experts = 0, num_experts
        self.num_exchanges = 0

    def own_segments(self, lengths: Sequence[int]) -> tuple[Segment, ...]:
        """See ``Parallel``."""
        return self.partition.segments(lengths, 0)

    def own_tokens(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return num_tokens

    def rows_per_rank(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return num_tokens

    def gathered_rows(self, num_tokens: int) -> int:
        """See ``Parallel``."""
        return num_tokens

    def gather_tokens(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """See ``Parallel``."""
        _same_memory("gather", local, full)

    def gather_ids(self, stream: Stream, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        """See ``Parallel``."""
        _same_memory("gather", local, full)

    def scatter_sum(
        self,
        stream: Stream,
        partial: torch.Tensor,
        hidden: torch.Tensor,
        num_tokens: int,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """See ``Parallel``."""
        raise NativeError("one rank has no partial sums", where="scatter_sum", hint="add to hidden directly")

    def share_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """See ``Parallel``."""

    def send_kv(self, stream: Stream, parts: Sequence[KvPart], scratch: torch.Tensor | None = None) -> None:
        """See ``Parallel``."""

    def restore_order(
        self, stream: Stream, gathered: torch.Tensor, ordered: torch.Tensor, lengths: Sequence[int]
    ) -> None:
        """See ``Parallel``."""
        _same_memory("restore_order", gathered, ordered)

    def agree(self, value: int) -> int:
        """See ``Parallel``."""
        return value


def _same_memory(where: str, source: torch.Tensor, destination: torch.Tensor) -> None:
    if source.data_ptr() != destination.data_ptr():
        raise NativeError("one rank's gathered rows are its local rows", where=where, hint="pass one tensor")
