"""Several sequences in one call on 1, 2, 3 and 4 ranks: each as it is alone.

As in test_ranks.py devices are doubles, ranks talk through Gloo, and logits are one rank's to TOLERANCE of
their norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_batches import FOLLOWING, LENGTHS, NEW_PROMPT, PROMPTS, SLOTS, TURNS
from rank_runs import computed_once, needs_double, run_script, vram_bytes

pytest.importorskip("torch.distributed")

pytestmark = needs_double
SIZES = {"64 experts": (1, 3), "5 experts": (1, 2, 3, 4)}
CASES = [(shape, size) for shape, sizes in SIZES.items() for size in sizes]
TOLERANCE = 1e-3
DECODED = 5e-3
"""Of tokens that experts on the CPU compute: activations of 8 bits round apart where a library's float32 sums
differ by the number of rows, as on CPUs without AVX-512 (seen: 2.1e-3)."""
SHORT_SUMS = 2e-3  # where partial sums are exchanged in 16 bits
SEED = 11  # with 7, one prompt's router is so near a tie that 8-bit keys choose another expert: 10 %
# A token of a pass, beside the same one decoded: by another copy of the experts, or on keys of 8 bits.
MIXED = {"64 experts": 0.1, "5 experts": 4e-3}
# 3 ranks have 22, 21 and 21 of 64 experts, streamed in groups; decode is rank 0's, on its CPU; 4 heads and 2
# KV heads on 3 ranks: nothing has to divide, for ranks share tokens. 5 experts on 4 ranks: 2, 1, 1, 1, all
# resident; no CPU experts: the ranks decode together.
SHAPES: dict[str, dict[str, Any]] = {
    "64 experts": {"num_experts": 64, "num_experts_per_tok": 4, "num_attention_heads": 4},
    "5 experts": {"num_experts": 5, "num_attention_heads": 2, "num_key_value_heads": 1},
}
TIERS = {"64 experts": ("gpu", "cpu"), "5 experts": ("gpu",)}
# Keys and values of 8 bits with their scales: ranks share the codes.
SETTINGS = {"64 experts": {}, "5 experts": {"kv_dtype": "int8"}}
NAMES = (
    *(f"prompt_{slot}" for slot in range(SLOTS)),
    *(f"token_{step}_{slot}" for step in range(len(FOLLOWING)) for slot in range(SLOTS)),
    *(f"turn_{slot}" for slot, _ in TURNS),
    *("new", "copied", "edited", "between"),
)
Outcomes = dict[tuple[str, int], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> dict[str, Path]:
    common = {"num_key_value_heads": 2, "vocab_size": 64, "moe_intermediate_size": 64}
    return {
        name: make_bundle(make_config(**common | shape), seed=SEED, gpu_group=64, tiers=TIERS[name])
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def outcomes(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    plan = [
        (
            str(bundle),
            [
                (size, vram_bytes(bundle, size, SLOTS) if "cpu" in TIERS[name] else None)
                for size in SIZES[name]
            ],
            SETTINGS[name],
        )
        for name, bundle in bundles.items()
    ]
    folder = computed_once(tmp_path_factory, "batches", plan)
    return {
        (name, size): dict(np.load(folder / str(index) / f"{size}.npz"))
        for index, name in enumerate(bundles)
        for size in SIZES[name]
    }


def tolerance(name: str) -> float:
    """Of one of NAMES."""
    return TOLERANCE if name.startswith("prompt") else DECODED


@pytest.mark.parametrize(("shape", "num_ranks"), CASES)
def test_each_sequence_is_as_alone(
    outcomes: Outcomes, relative_error: Callable[..., float], shape: str, num_ranks: int
) -> None:
    found = outcomes[shape, num_ranks]
    for name in NAMES:
        assert found[name].shape == found[f"{name}_alone"].shape
        assert relative_error(found[name], found[f"{name}_alone"]) < tolerance(name), name
    assert relative_error(found["mixed"], found["mixed_alone"]) < MIXED[shape]
    assert found["lengths"].tolist() == [8, 21, 8, 11, 21]


@pytest.mark.parametrize(("shape", "num_ranks"), [case for case in CASES if case[1] > 1])
def test_ranks_agree_with_one(
    outcomes: Outcomes, relative_error: Callable[..., float], shape: str, num_ranks: int
) -> None:
    one, several = outcomes[shape, 1], outcomes[shape, num_ranks]
    for name in NAMES:
        assert relative_error(several[name], one[f"{name}_alone"]) < tolerance(name), name


def test_any_ranks_lack_of_memory_halves_the_batch_of_all(
    bundles: dict[str, Path], tmp_path: Path, relative_error: Callable[..., float]
) -> None:
    """Four passes that ranks cannot go on with, then five of 4 tokens. Sums of 16 bits, and rows exchanged
    beside the compute stream, as in passes that are longer than any test's."""
    bundle = bundles["64 experts"]
    sizes = [(size, vram_bytes(bundle, size, SLOTS)) for size in (1, 3)]
    done = run_script("memory", tmp_path, json.dumps([(str(bundle), sizes)]))
    assert done.returncode == 0, done.stdout + done.stderr
    one, found = (dict(np.load(tmp_path / "0" / f"{size}.npz")) for size in (1, 3))
    assert found["chunks"].tolist() == [64, 4]
    assert (one["beside"], found["beside"] >= 30) == (0, True)
    np.testing.assert_array_equal(found["behind"], found["alone"][-8:])  # on the compute stream
    assert relative_error(found["together"], found["alone"]) < SHORT_SUMS
    assert relative_error(found["together"], one["together"]) < SHORT_SUMS
    np.testing.assert_array_equal(found["together"].argmax(1), one["together"].argmax(1))


def test_logits_of_transformers(
    bundles: dict[str, Path],
    outcomes: Outcomes,
    reference_logits: Callable[..., np.ndarray],
    relative_error: Callable[..., float],
) -> None:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.cpu.weights import load_weights

    with Bundle.open(bundles["5 experts"]) as bundle:
        weights = load_weights(bundle, "gpu")
        expected = [reference_logits(weights, prompt)[-1] for prompt in PROMPTS]
        turn = reference_logits(weights, [*PROMPTS[3], *FOLLOWING, *TURNS[1][1]])[LENGTHS[3] + 2 :]
        new = reference_logits(weights, NEW_PROMPT)
    for size in SIZES["5 experts"]:
        found = outcomes["5 experts", size]
        for slot, row in enumerate(expected):
            assert relative_error(found[f"prompt_{slot}"], row) < 1e-2
        assert relative_error(found["turn_3"], turn) < 1e-2
        assert relative_error(found["new"], new) < 1e-2
