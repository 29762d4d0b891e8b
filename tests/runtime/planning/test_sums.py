"""Which passes exchange partial sums in f32: those to which two bytes more a value are nothing."""

from __future__ import annotations

import pytest

from krasis.formats.models.uniform import architecture_of
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.planning.sums import EXPERT_SHARE, LATENCY_BYTES, exact_tokens
from krasis.runtime.planning.workspace import workspace_bytes, workspace_layout

LARGE = shape_of(architecture_of(shape("qwen3-235b-a22b"), ""))


@pytest.mark.parametrize(
    ("num_ranks", "resident", "streamed"), [(1, 0, 0), (2, 64, 1152), (3, 48, 576), (4, 40, 384)]
)
def test_a_large_model(num_ranks: int, resident: int, streamed: int) -> None:
    assert exact_tokens(LARGE, num_ranks, 0.0) == resident
    assert exact_tokens(LARGE, num_ranks) == streamed


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_the_bytes_are_bounded(num_ranks: int, share: float) -> None:
    """Received beyond 16 bits: next to nothing for the longest such pass, more for the next."""
    tokens = exact_tokens(LARGE, num_ranks, share)
    experts = LARGE.num_experts * 3 * LARGE.hidden_size * LARGE.expert_intermediate_size / 2 / num_ranks
    limit = max(LATENCY_BYTES, share * experts / EXPERT_SHARE)
    a_row = (num_ranks - 1) * LARGE.hidden_size * 2
    assert tokens % num_ranks == 0
    assert tokens // num_ranks * a_row <= limit < (tokens // num_ranks + 1) * a_row


def test_a_long_passs_memory_is_what_it_was() -> None:
    """And shorter ones are counted with their sums in f32, those of others beside."""
    for num_ranks in (2, 3):
        long = workspace_layout(LARGE, 10_000, num_ranks)
        assert workspace_bytes(LARGE, 10_000, num_ranks) == long.total_bytes
        few = exact_tokens(LARGE, num_ranks)
        for count in (few, few + 1):
            exact = workspace_layout(LARGE, min(count, few), num_ranks, exact=True)
            assert workspace_bytes(LARGE, count, num_ranks) >= exact.total_bytes
    assert workspace_bytes(LARGE, 64, 1) == workspace_layout(LARGE, 64, 1).total_bytes
