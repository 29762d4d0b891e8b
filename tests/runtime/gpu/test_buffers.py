"""The workspace of a pass: what the planner counts is what is allocated, and what
lives together lies apart.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.architecture import Architecture, RopeScaling
from krasis.formats.errors import NativeError, OutOfDeviceMemoryError
from krasis.formats.models.uniform import architecture_of
from krasis.runtime.gpu.buffers import Buffers, Workspace
from krasis.runtime.gpu.kernels.many_rows import SCRATCH_BYTES as LIBRARY_SCRATCH_BYTES
from krasis.runtime.gpu.parallel import SingleRank
from krasis.runtime.gpu.partition import Partition
from krasis.runtime.planning.placement import gpu_workspace_bytes
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.workspace import (
    SCRATCH_BYTES,
    activation_bytes,
    routing_bytes,
    rows_per_rank,
    workspace_bytes,
    workspace_layout,
)

ATTENTION = ("qkv", "attended", "shared_kv")
ROUTING = ("normed", "router_logits")
EXPERTS, SUMS = ("gated", "slots", "partial"), ("partial", "received")
HEAD = ("ordered_x", "logits")
ALWAYS = ("hidden", "x", "ids", "weights", "gathered_x", "gathered_ids", "gathered_weights")


def architecture(experts: int = 6, top_k: int = 2, hidden: int = 64, inner: int = 64) -> Architecture:
    return Architecture(
        model_type="qwen3_moe", num_layers=2, hidden_size=hidden, num_heads=4, num_kv_heads=2, head_dim=32,
        num_experts=experts, num_experts_per_token=top_k, expert_intermediate_size=inner, vocab_size=31,
        max_positions=4096, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=RopeScaling(),
        norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip


architectures = st.builds(
    architecture,
    experts=st.integers(4, 200),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([64, 192]),
    inner=st.sampled_from([64, 320]),
)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 301])
def test_it_allocates_what_the_planner_counts(kernel_device, num_tokens: int, num_ranks: int) -> None:
    arch = architecture()
    before = kernel_device.free_bytes()
    workspace = Workspace(kernel_device, arch, torch.bfloat16, num_tokens, num_ranks)
    taken = before - kernel_device.free_bytes()
    assert workspace.memory.numel() == workspace_bytes(arch, num_tokens, num_ranks)
    planned = activation_bytes(arch, num_tokens, num_ranks)
    # The slots' tables are bounded, not counted: for the block size that takes the most.
    assert taken <= planned + 6 * 512  # the double rounds each of 6 allocations up to 512
    assert taken >= planned - routing_bytes(arch, num_tokens, num_ranks)
    assert gpu_workspace_bytes(arch, num_tokens, num_ranks) == planned + LIBRARY_SCRATCH_BYTES


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("num_tokens", [1, 256, 10_000])
def test_tables_of_real_shapes_fit_in_their_bound(kernel_device, name: str, num_tokens: int) -> None:
    from krasis.runtime.gpu.kernels.gpu_kernels import Routing

    arch = architecture_of(shape(name), "")
    tables = Routing.allocate(kernel_device, num_tokens, arch.num_experts_per_token, arch.num_experts)
    fields = (
        tables.sorted_slots,
        tables.block_experts,
        tables.first_block,
        tables.counts,
        tables.num_invalid,
    )
    assert sum(field.nbytes for field in fields) <= routing_bytes(arch, num_tokens, 1)
    assert SCRATCH_BYTES == LIBRARY_SCRATCH_BYTES


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_shapes_and_places_of_a_pass(kernel_device, num_ranks: int) -> None:
    arch = architecture()
    workspace = Workspace(kernel_device, arch, torch.float16, 50, num_ranks, exact_tokens=13)
    for num_tokens in (1, 13, 14, 50):
        b = workspace.view(num_tokens)
        own = Partition(num_ranks).rows_per_rank(num_tokens)
        gathered = own * num_ranks
        assert b.hidden.shape == (own, 64)
        assert (b.hidden.dtype, b.x.dtype, b.ids.dtype) == (torch.float32, torch.float16, torch.int32)
        assert b.qkv.shape == (own, arch.qkv_rows)
        assert b.slots.shape == (gathered * 2, 64)
        assert b.gathered_x.shape == (gathered, 64)
        assert b.ordered_x.shape == (num_tokens, 64)
        assert b.logits.shape == (min(gathered, 64), 32)
        assert (b.partial is None) == (num_ranks == 1)
        if b.partial is not None:
            assert b.received.shape == b.partial.shape == (gathered, 64)
            assert b.received.dtype == b.partial.dtype
            assert b.partial.dtype == (torch.float32 if num_tokens <= 13 else torch.float16)
        if num_ranks == 1:
            SingleRank(6).gather_tokens(None, b.x, b.gathered_x, num_tokens)  # same memory, or it raises
        assert all(tensor.is_contiguous() and not tensor.data_ptr() % 256 for tensor in tensors(b).values())
        assert all(span(workspace.memory)[0] <= span(one)[0] for one in tensors(b).values())
        assert all(span(one)[1] <= span(workspace.memory)[1] for one in tensors(b).values())


def tensors(buffers: Buffers) -> dict[str, torch.Tensor]:
    names = (*ALWAYS, *ATTENTION, *ROUTING, *EXPERTS, *SUMS, *HEAD)
    return {name: one for name in names if (one := getattr(buffers, name)) is not None}


@given(arch=architectures, num_tokens=st.integers(1, 400), num_ranks=st.integers(1, 4), exact=st.booleans())
@settings(deadline=None)
def test_what_lives_together_lies_apart(
    arch: Architecture, num_tokens: int, num_ranks: int, exact: bool
) -> None:
    layout = workspace_layout(arch, num_tokens, num_ranks, exact=exact)
    assert ("received" in layout.regions) == (exact and num_ranks > 1)
    for phase in (ATTENTION, ROUTING, EXPERTS, SUMS, HEAD):
        together = [layout.regions[name] for name in (*ALWAYS, *phase) if name in layout.regions]
        spans = sorted((one.offset_bytes, one.offset_bytes + one.num_bytes) for one in together)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert spans[-1][1] <= layout.total_bytes
    assert rows_per_rank(num_tokens, num_ranks) == Partition(num_ranks).rows_per_rank(num_tokens)


@given(arch=architectures, num_tokens=st.integers(1, 400), num_ranks=st.integers(1, 4))
@settings(deadline=None)
def test_fewer_tokens_need_no_more(arch: Architecture, num_tokens: int, num_ranks: int) -> None:
    sizes = [activation_bytes(arch, count, num_ranks) for count in (num_tokens, num_tokens + 1)]
    assert sizes[0] <= sizes[1]


def test_more_tokens_than_planned_are_refused(kernel_device) -> None:
    workspace = Workspace(kernel_device, architecture(), torch.float16, 8, 2)
    for count in (0, 9):
        with pytest.raises(NativeError, match="workspace is too small"):
            workspace.view(count)
    assert workspace.view(2, num_ranks=1).partial is None
    quarters = Workspace(kernel_device, architecture(top_k=1), torch.float16, 8, 4)
    assert not quarters.fits(8, 1)  # alone, a rank has four times the rows of its own


def test_memory_given_up_is_free(kernel_device) -> None:
    free = kernel_device.free_bytes()
    workspace = Workspace(kernel_device, architecture(), torch.float16, 64, 1)
    workspace.give_up()
    assert free - kernel_device.free_bytes() < 20_000
    with pytest.raises(OutOfDeviceMemoryError):
        Workspace(kernel_device, architecture(), torch.float16, 10**6, 1)
