"""A model with gated residual streams and hashed n-gram tables: ends of texts within a prompt, sequences in
one batch, going back. The first is compared with transformers, the others with that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of, one_sequence
from krasis.runtime.cpu.backend import CpuBackend
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

END = 256
TOKENS = np.random.default_rng(9).integers(0, 256, 48).tolist()
TOKENS[5] = TOKENS[20] = TOKENS[22] = END
TOKENS[30:34] = TOKENS[0:4]  # the rows of a bigram again
RelativeError = Callable[[np.ndarray, np.ndarray], float]


def converted(source: Path, out: Path, *options: str) -> str:
    arguments = [str(source), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text", *options]
    done = CliRunner().invoke(convert, arguments)
    return "" if done.exit_code == 0 else done.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen4_exp", tmp_path_factory.mktemp("qwen4_exp") / "hf")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "model.krasis"
    assert not converted(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def weights(bundle: Path) -> ModelWeights:
    with Bundle.open(bundle) as opened:
        return load_weights(opened, "cpu")


def backend_of(weights: ModelWeights) -> CpuBackend:
    return CpuBackend(weights, EngineSettings(context=64, threads=1, slots=3))


def test_ends_within_a_prompt(
    bundle: Path, checkpoint: Path, weights: ModelWeights, relative_error: RelativeError
) -> None:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    folder = write_checkpoint(dequantised_state(weights), config, checkpoint.parent / "dequantised")
    expected = transformers_logits(folder, TOKENS)
    settings = EngineSettings(
        context=64, device="cpu", activations="float32", kv_dtype="f32", threads=1, prefault=False
    )
    with Engine.open(bundle, settings) as engine:
        assert relative_error(engine.prefill(TOKENS, all_logits=True), expected) <= 1e-5
        engine.reset()
        parts = [engine.prefill(TOKENS[a:b], all_logits=True) for a, b in ((0, 1), (1, 6), (6, 21), (21, 48))]
        assert relative_error(np.concatenate(parts), expected) <= 1e-5
    backend = backend_of(weights)
    slot = backend.state.open()
    found = [backend.run(one_sequence(np.array([t]), i, "all", slot))[0].copy() for i, t in enumerate(TOKENS)]
    assert relative_error(np.stack(found), expected) <= 2e-2
    backend.close()


def test_batches_and_going_back(weights: ModelWeights) -> None:
    """Sequences get the bits of their own runs, together, after going back, and between another's layers."""
    backend = backend_of(weights)
    state = backend.state
    first, second, third = state.open(), state.open(), state.open()
    one, two, other = TOKENS[:20], TOKENS[20:31], TOKENS[31:46]

    def alone(tokens: list[int]) -> np.ndarray:
        own = backend_of(weights)
        logits = own.run(one_sequence(np.array(tokens), 0, slot=own.state.open()))[0].copy()
        own.close()
        return logits

    both = backend.run(batch_of([(first, 0, one, "last"), (second, 0, two, "last")])).copy()
    np.testing.assert_array_equal(both, [alone(one), alone(two)])
    for slot in (first, second):
        state.checkpoint(slot)
    after = backend.run(batch_of([(first, 20, [END], "last"), (second, 11, [3], "last")])).copy()
    np.testing.assert_array_equal(after, [alone([*one, END]), alone([*two, 3])])
    between: list[np.ndarray] = []

    def layer_done(done: int, count: int) -> None:
        if done == 1:
            between.append(backend.run(one_sequence(np.array([9]), 21, slot=first))[0].copy())

    backend.layer_done = layer_done
    mine = backend.run(one_sequence(np.array(other), 0, slot=third))[0].copy()
    backend.layer_done = None
    np.testing.assert_array_equal(mine, alone(other))
    np.testing.assert_array_equal(between[0], alone([*one, END, 9]))
    assert state.restorable(first, 21) == 20
    state.rewind(first, 20)
    again = backend.run(one_sequence(np.array([7, 8]), 20, slot=first))[0].copy()
    np.testing.assert_array_equal(again, alone([*one, 7, 8]))
    backend.close()


def test_contexts_end_at_the_budget(bundle: Path) -> None:
    """Up to there the index picks every block, and attention computes what it would."""
    settings = EngineSettings(device="cpu", threads=1, prefault=False)
    with Engine.open(bundle, settings) as engine:
        assert engine.context == 80
    with pytest.raises(UnsupportedModelError, match=r"--ctx.*sparse attention by an index.*got 81; limit 80"):
        Engine.open(bundle, EngineSettings(device="cpu", context=81))
