"""Every family that runs: both CPU backends against transformers in float32 on the same dequantised weights,
in any chunks, and several sequences in one batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from krasis.formats.layouts import CpuTileLayout
from krasis.formats.models.registry import family_of_model_type, spec_from_hf
from krasis.formats.native import Pool
from krasis.runtime.backend import Backend
from krasis.runtime.batch import batch_of, one_sequence
from krasis.runtime.cpu.backend import CpuBackend
from krasis.runtime.cpu.float_backend import FloatBackend
from krasis.runtime.cpu.weights import ModelWeights
from krasis.runtime.settings import EngineSettings
from tests.support.random_weights import Packer, dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_families import CONFIGS

RelativeError = Callable[[np.ndarray, np.ndarray], float]
TOKENS = np.random.default_rng(5).integers(0, 203, 75).tolist()


FAMILIES = [name for name in CONFIGS if family_of_model_type(name).names]


@pytest.fixture(scope="module", params=FAMILIES)
def weights(request: pytest.FixtureRequest, pool: Pool) -> ModelWeights:
    spec = spec_from_hf(CONFIGS[request.param], request.param)
    return Packer(spec, CpuTileLayout("q8"), pool).model()


@pytest.fixture(scope="module")
def expected(weights: ModelWeights, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    config = CONFIGS[weights.spec.family]
    folder = write_checkpoint(dequantised_state(weights), config, tmp_path_factory.mktemp("checkpoint"))
    return transformers_logits(folder, TOKENS)


def all_logits(backend: Backend, chunks: list[int]) -> np.ndarray:
    """Of TOKENS, given in chunks of these sizes."""
    slot, out, start = backend.state.open(), [], 0
    for size in chunks:
        piece = np.array(TOKENS[start : start + size])
        out.append(backend.run(one_sequence(piece, start, "all", slot)).copy())
        start += size
    backend.state.close(slot)
    return np.concatenate(out)


CHUNKS = pytest.mark.parametrize("chunks", [[75], [16, 16, 16, 16, 11], [1] * 75], ids=["1", "16", "75"])


@CHUNKS
def test_float_equals_transformers(
    weights: ModelWeights, expected: np.ndarray, relative_error: RelativeError, chunks: list[int]
) -> None:
    settings = EngineSettings(context=128, kv_dtype="f32", activations="float32")
    backend = FloatBackend(weights, settings)
    assert relative_error(all_logits(backend, chunks), expected) <= 1e-4


@CHUNKS
@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
def test_int8_equals_transformers(
    weights: ModelWeights,
    expected: np.ndarray,
    relative_error: RelativeError,
    chunks: list[int],
    kv_dtype: str,
) -> None:
    backend = CpuBackend(weights, EngineSettings(context=128, kv_dtype=kv_dtype, threads=2))
    assert relative_error(all_logits(backend, chunks), expected) <= 2e-2
    backend.close()


def test_a_cache_of_8_bits(
    weights: ModelWeights, expected: np.ndarray, relative_error: RelativeError
) -> None:
    """Within 1 % of the norm where nothing else is rounded; in any chunks with the same bits."""
    wide, narrow = (
        FloatBackend(weights, EngineSettings(context=128, kv_dtype=kv_dtype, activations="float32"))
        for kv_dtype in ("f16", "int8")
    )
    assert relative_error(all_logits(narrow, [70, 5]), all_logits(wide, [75])) <= 1e-2
    backend = CpuBackend(weights, EngineSettings(context=128, kv_dtype="int8", threads=2))
    whole = all_logits(backend, [75])
    assert relative_error(whole, expected) <= 2e-2
    np.testing.assert_array_equal(all_logits(backend, [33, 1, 1, 40]), whole)
    backend.close()


def test_int8_gives_the_same_bits_in_any_chunks(weights: ModelWeights) -> None:
    backend = CpuBackend(weights, EngineSettings(context=128, threads=2))
    whole = all_logits(backend, [75])
    for chunks in ([1] * 75, [7, 33, 35]):
        np.testing.assert_array_equal(all_logits(backend, chunks), whole)
    backend.close()


def test_sequences_of_one_batch_get_the_bits_of_their_own_runs(weights: ModelWeights) -> None:
    """Prompts of several lengths in one pass, then their next tokens together, then one of them goes on while
    another begins."""
    lengths = (40, 3, 21)
    settings = EngineSettings(context=128, threads=2, slots=4)
    backend = CpuBackend(weights, settings)
    slots = [backend.state.open() for _ in lengths]
    prompts = [TOKENS[at : at + n] for at, n in zip((0, 11, 30), lengths, strict=True)]
    found = [
        [rows]
        for rows in backend.run(
            batch_of([(s, 0, p, "last") for s, p in zip(slots, prompts, strict=True)])
        ).copy()
    ]
    for step in range(4):
        batch = batch_of([(s, n + step, [step + s], "last") for s, n in zip(slots, lengths, strict=True)])
        for rows, logits in zip(found, backend.run(batch).copy(), strict=True):
            rows.append(logits)
    late = backend.state.open()
    mixed = backend.run(batch_of([(slots[1], 7, [9], "last"), (late, 0, TOKENS[:5], "last")])).copy()
    found[1].append(mixed[0])
    alone = CpuBackend(weights, settings)
    for slot, prompt, rows in zip(slots, prompts, found, strict=True):
        mine = alone.state.open()
        following = [step + slot for step in range(4)] + ([9] if slot == slots[1] else [])
        expected = [alone.run(one_sequence(np.array(prompt), 0, slot=mine))[0].copy()]
        for at, token in enumerate(following):
            expected.append(alone.run(one_sequence(np.array([token]), len(prompt) + at, slot=mine))[0].copy())
        np.testing.assert_array_equal(np.stack(rows), np.stack(expected))
        alone.state.close(mine)
    mine = alone.state.open()
    np.testing.assert_array_equal(mixed[1], alone.run(one_sequence(np.array(TOKENS[:5]), 0, slot=mine))[0])
    backend.close()
    alone.close()
