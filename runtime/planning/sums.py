"""How wide the sums are that ranks exchange behind a layer's experts. Torch-free.

Each rank's partial sums go to the others in 16 bits or in f32. A rounding to 16 bits is no larger than that
of an expert's output, but it is one that a single rank does not make: it moves some step of what rounds
behind it, activations of the CPU's experts above all. So f32, as long as the two bytes more a value cost
next to nothing. A pass of T tokens on R ranks receives (R-1) * ceil(T / R) * hidden * 2 bytes a layer more;
that is next to nothing

- up to LATENCY_BYTES: 5 us at 50 GB/s, 0.6 us of NVLink's 450, where a collective takes 20 and more, and a
  layer makes four;
- up to an EXPERT_SHARE-th of what a rank copies of the layer's experts from host memory in the same time:
  under 1 % of the pass if both share a link, less if there is NVLink. (Counted in 4 bits a weight, the least
  that experts have.)

At Qwen3-235B's shape that is up to 64 tokens on 2 GPUs with all experts in VRAM, and with all streamed 1,152
on 2, 576 on 3, 384 on 4. For every length it would be too much: of 10,000 tokens two GPUs receive 41 MB more
a layer, beside 0.6 GB of experts on a link without NVLink 6.5 %; and with all experts in VRAM, where a layer
takes 9.2 ms (two H200, measured), 1.5 % by NVLink at 300 GB/s and 9 % by PCIe at 50.
"""

from __future__ import annotations

from functools import lru_cache

from krasis.runtime.planning.shape import AnyModel, largest_shape

LATENCY_BYTES = 2**18
EXPERT_SHARE = 128
_MORE_BYTES = 2  # of a value in f32 than of one in 16 bits
_WEIGHTS_A_BYTE = 2
_MATRICES = 3


@lru_cache(maxsize=256)
def exact_tokens(model: AnyModel, num_ranks: int, streamed_share: float = 1.0) -> int:
    """The longest pass, in tokens of all ranks, whose partial sums are exchanged in f32. streamed_share: of
    a rank's experts, those that every pass copies from host memory. 0 with one rank, which has none.
    """
    if num_ranks == 1:
        return 0
    shape = largest_shape(model)
    weights = shape.num_experts * _MATRICES * shape.hidden_size * shape.expert_intermediate_size
    copied_bytes = int(streamed_share * weights) // (_WEIGHTS_A_BYTE * num_ranks)
    most_bytes = max(LATENCY_BYTES, copied_bytes // EXPERT_SHARE)
    rows = most_bytes // ((num_ranks - 1) * shape.hidden_size * _MORE_BYTES)
    return rows * num_ranks
