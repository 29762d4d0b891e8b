"""Hybrid decode token by token against transformers in float32, each expert dequantised from the tier that
ran it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.architecture import Architecture

# Relative errors of logits: from int8 activations of the CPU's experts, and from the GPU's 16-bit rounding.
INT8 = 2e-2
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def decode_all(decoder: Any, tokens: list[int]) -> np.ndarray:
    return np.stack([decoder.decode(token, position).copy() for position, token in enumerate(tokens)])


def residents(residency: Any) -> set[tuple[int, int]]:
    return {(int(layer), int(expert)) for layer, expert in np.argwhere(residency.host_addresses != 0)}


@pytest.fixture
def check(
    tiers: Any, tokens: list[int], reference_logits: Callable[..., Any], relative_error: Callable[..., float]
) -> Callable[..., None]:
    def compare(found: np.ndarray, on_gpu: set[tuple[int, int]], limit: float) -> None:
        expected = reference_logits(tiers.mixed(on_gpu), tokens)
        for position in range(len(tokens)):
            assert relative_error(found[position], expected[position]) < limit, position

    return compare


@pytest.mark.parametrize("seed", range(4))
def test_experts_on_the_cpu(
    open_rig: Any, tokens: list[int], check: Any, seed: int, shape: Architecture
) -> None:
    rig = open_rig(seed=seed)
    decoder = rig.decoder()
    check(decode_all(decoder, tokens), set(), INT8)
    split = decoder.last_split
    assert split["num_cpu_experts"] == shape.num_layers * shape.num_experts_per_token
    assert split["num_gpu_experts"] == 0
    decoder.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_slots", [1, 9, 18])
def test_experts_on_both_sides(
    open_rig: Any, tokens: list[int], check: Any, dtype: torch.dtype, num_slots: int, shape: Architecture
) -> None:
    rig = open_rig(dtype, seed=num_slots)
    residency = rig.residency(num_slots)
    residency.fill(rig.model.stream)
    assert residency.num_resident == num_slots
    on_gpu = residents(residency)
    decoder = rig.decoder(residency)
    check(decode_all(decoder, tokens), on_gpu, (INT8 if num_slots < 18 else 0) + ROUNDING[dtype])
    means = decoder.mean_split()
    routed = shape.num_layers * shape.num_experts_per_token
    assert means["num_tokens"] == len(tokens)
    assert means["num_cpu_experts"] + means["num_gpu_experts"] == pytest.approx(routed)
    assert (means["num_cpu_experts"] == 0) == (num_slots == 18)
    assert means["num_gpu_experts"] > 0


def test_tokens_may_be_decoded_again(open_rig: Any, tokens: list[int]) -> None:
    """Positions are the caller's: what lies behind one is overwritten, and the same input gives the same
    bits."""
    decoder = open_rig(seed=1).decoder()
    first = decode_all(decoder, tokens)
    assert (decode_all(decoder, tokens[:4]) == first[:4]).all()
    other = decoder.decode((tokens[2] + 1) % 90, 2).copy()
    assert np.abs(other - first[2]).max() > 0.01
    assert (decoder.decode(tokens[2], 2) == first[2]).all()


def make_hot(rig: Any, residency: Any, experts: np.ndarray) -> None:
    """As if very many tokens had been routed to these experts: all that was seen before is forgotten."""
    counts = residency.counts

    def count(_: int) -> None:
        counts.view(-1)[torch.from_numpy(experts)] += 1000

    rig.model.stream.launch("count", count, reads=(counts,), writes=(counts,))
    residency.note_tokens(rig.model.stream, 100_000)


@pytest.mark.parametrize("seed", range(6))
def test_residents_change_between_tokens(
    open_rig: Any,
    tokens: list[int],
    tiers: Any,
    reference_logits: Callable[..., Any],
    relative_error: Callable[..., float],
    shape: Architecture,
    seed: int,
) -> None:
    """Other experts are hot at every token. Each token's logits are those of the tiers that its tables named.

    Always at position 0, so that no key or value was computed with other residents.
    """
    rig = open_rig(seed=seed)
    residency = rig.residency(5)
    decoder = rig.decoder(residency)
    random = np.random.default_rng(seed)
    num_experts = shape.num_layers * shape.num_experts
    seen: set[frozenset[tuple[int, int]]] = set()
    for token in tokens:
        on_gpu = residents(residency)
        seen.add(frozenset(on_gpu))
        found = decoder.decode(token, 0)
        expected = reference_logits(tiers.mixed(on_gpu), [token])[0]
        assert relative_error(found, expected) < INT8 + ROUNDING[torch.float16]
        make_hot(rig, residency, random.choice(num_experts, 5, replace=False))
        for _ in range(6):
            residency.update(rig.model.stream)
    assert residency.num_swaps > 3
    assert len(seen) > 2


def test_a_token_waits_for_no_copy_to_the_device(open_rig: Any, tokens: list[int]) -> None:
    """There experts of a pass may be on their way: all that is copied is logits and counts, to the host."""
    rig = open_rig()
    decoder = rig.decoder()
    first = decoder.decode(tokens[0], 0).copy()
    before = len(rig.device.executed_orders)
    assert (decoder.decode(tokens[0], 0) == first).all()
    executed = rig.device.executed_orders[before:]
    assert executed.count("copy on stream compute") == 2
    assert executed.count("fetch on stream compute") == 1
