"""Tokens that ranks decode together where GPUs do not hold all experts: the CPU has the rest.

Devices are doubles, ranks processes. With all experts in VRAM: test_ranks.py and test_rank_batches.py. The
CPU's experts are another copy and take activations in int8, so logits depend on who holds what.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_decode import NUM_ALONE, SLOTS
from rank_runs import computed_once, needs_double, vram_bytes

pytest.importorskip("torch.distributed")

pytestmark = needs_double
OTHER_EXPERTS = 0.2
SIZES = (1, 3)
EXPERTS, TOP_K, LAYERS, MORE_PLACES = 128, 4, 2, 50
NAMES = ("one_0", f"one_{NUM_ALONE - 1}", "three", "turn", "between", "two", "last")
Outcomes = dict[int, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def outcomes(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcomes:
    """By ranks; 3 have 43, 43 and 42 experts of a layer and room for some of them, by turns."""
    shape = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 64}
    config = make_config(**shape, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    bundle = make_bundle(config, seed=5, gpu_group=64, tiers=("gpu", "cpu"))
    plan = [(str(bundle), [(size, room_for(bundle, size)) for size in SIZES])]
    folder = computed_once(tmp_path_factory, "decode", plan)
    return {size: dict(np.load(folder / "0" / f"{size}.npz")) for size in SIZES}


def room_for(bundle: Path, num_ranks: int) -> int:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.planning import sizes_of_bundle

    with Bundle.open(bundle) as opened:
        expert_bytes = sizes_of_bundle(opened.manifest).gpu_expert_bytes
    return vram_bytes(bundle, num_ranks, SLOTS) + MORE_PLACES * expert_bytes


def test_logits_of_one_rank(outcomes: Outcomes, relative_error: Callable[..., float]) -> None:
    assert str(outcomes[3]["placement"][1]) == "ranks of this host: 3 GPUs + CPU experts"
    for name in NAMES:
        assert relative_error(outcomes[3][name], outcomes[1][name]) < OTHER_EXPERTS, name


@pytest.mark.parametrize("num_ranks", SIZES)
def test_every_expert_is_computed_once(outcomes: Outcomes, num_ranks: int) -> None:
    """On one of all sides; three GPUs leave fewer of them to the CPU."""
    counts = outcomes[num_ranks]["counts"]
    rows = [1] * NUM_ALONE + [3, 2, 1]
    assert counts.sum(axis=1).tolist() == [LAYERS * TOP_K * count for count in rows]
    assert counts[:, 0].any()
    if num_ranks > 1:
        assert counts[:, 1].sum() > outcomes[1]["counts"][:, 1].sum()
