"""Several sequences at once on the device's double, through the backend's own interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.batch import batch_of, one_sequence

RelativeError = Callable[[np.ndarray, np.ndarray], float]
LENGTHS = (30, 2, 17)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Any) -> Path:
    return make_bundle(make_config(num_hidden_layers=2))


@pytest.fixture
def prompts(random_tokens: Callable[[int, int], list[int]]) -> list[list[int]]:
    return [random_tokens(length, 300) for length in LENGTHS]


def test_prompts_and_tokens_of_several_sequences(
    bundle: Path,
    prompts: list[list[int]],
    open_gpu: Callable[..., Any],
    vram_for: Callable[..., int],
    relative_error: RelativeError,
) -> None:
    """In one pass, then token by token, one going on while another is replaced: as each does alone."""
    settings = {"context": 64, "gpu_dtype": "f16", "vram_bytes": 2 * vram_for(bundle, 64, group_experts=6)}
    engine = open_gpu(bundle, seed=3, slots=3, **settings)
    backend = engine._backend
    slots = [0, backend.state.open(), backend.state.open()]
    with pytest.raises(ResourceError, match="every slot"):
        backend.state.open()
    parts = [(slot, 0, prompt, "last") for slot, prompt in zip(slots, prompts, strict=True)]
    found = [[row] for row in backend.run(batch_of(parts)).copy()]
    assert backend.last_prefill.num_passes == 1
    for step in range(3):
        rows = backend.run(
            batch_of([(s, n + step, [s + step], "last") for s, n in zip(slots, LENGTHS, strict=True)])
        )
        for logits, row in zip(rows.copy(), found, strict=True):
            row.append(logits)
    assert [backend.state.length(slot) for slot in slots] == [33, 5, 20]
    backend.state.close(slots[2])
    late = backend.state.open()
    mixed = backend.run(batch_of([(slots[1], 5, [9], "last"), (late, 0, prompts[0][:7], "all")])).copy()
    found[1].append(mixed[0])

    alone = open_gpu(bundle, seed=4, **settings)._backend
    for number, (slot, prompt, logits) in enumerate(zip(slots, prompts, found, strict=True)):
        expected = [alone.run(one_sequence(np.array(prompt), 0))[0].copy()]
        following = [slot + step for step in range(3)] + ([9] if number == 1 else [])
        for at, token in enumerate(following):
            expected.append(alone.run(one_sequence(np.array([token]), len(prompt) + at))[0].copy())
        if number == 1:  # its last token ran in a pass there, by another copy of the experts
            assert relative_error(logits.pop(), expected.pop()) <= 0.1
        assert relative_error(np.stack(logits), np.stack(expected)) <= 1e-3
    assert relative_error(mixed[1:], alone.run(one_sequence(np.array(prompts[0][:7]), 0, "all"))) <= 1e-3


def test_a_batch_longer_than_a_pass(
    bundle: Path,
    prompts: list[list[int]],
    open_gpu: Callable[..., Any],
    relative_error: RelativeError,
) -> None:
    engine = open_gpu(bundle, seed=5, slots=3, context=64, gpu_dtype="f16", prefill_chunk=16)
    backend = engine._backend
    slots = [0, backend.state.open(), backend.state.open()]
    parts = [(slot, 0, prompt, "last") for slot, prompt in zip(slots, prompts, strict=True)]
    found = backend.run(batch_of(parts)).copy()
    assert backend.last_prefill.num_passes == 4
    alone = open_gpu(bundle, seed=6, context=64, gpu_dtype="f16")._backend
    expected = [alone.run(one_sequence(np.array(prompt), 0))[0].copy() for prompt in prompts]
    assert relative_error(found, np.stack(expected)) <= 1e-3
    with pytest.raises(NativeError, match="computed in order"):
        backend.run(batch_of([(slots[1], 4, [1], "last")]))


def test_more_sequences_than_a_decode_call_takes(
    bundle: Path, open_gpu: Callable[..., Any], relative_error: RelativeError
) -> None:
    backend = open_gpu(bundle, seed=9, slots=10, context=16, gpu_dtype="f16")._backend
    slots = [0, *(backend.state.open() for _ in range(9))]
    backend.run(batch_of([(slot, 0, [5, 7 + slot], "none") for slot in slots]))
    before = backend.last_prefill
    found = backend.run(batch_of([(slot, 2, [40 + slot], "last") for slot in slots])).copy()
    assert backend.last_prefill is before  # no pass
    alone = open_gpu(bundle, seed=10, context=16, gpu_dtype="f16")._backend
    for slot in (0, 7, 8, 9):
        alone.run(one_sequence(np.array([5, 7 + slot]), 0, "none"))
        expected = alone.run(one_sequence(np.array([40 + slot]), 2))[0]
        assert relative_error(found[slot], expected) <= 1e-3


def test_the_memory_of_all_slots_is_planned(bundle: Path, open_gpu: Callable[..., Any]) -> None:
    memory = {"context": 64, "vram_bytes": 2**31}
    one, four = (open_gpu(bundle, slots=slots, **memory)._backend for slots in (1, 4))
    plans = [backend._parts.plan.placement for backend in (one, four)]
    assert plans[1].kv_bytes == 4 * plans[0].kv_bytes
    assert plans[0].spare_bytes - plans[1].spare_bytes == 3 * plans[0].kv_bytes
    assert four._parts.model.cache.memory.nbytes == 4 * one._parts.model.cache.memory.nbytes
    assert "4 sequences" in four.description
