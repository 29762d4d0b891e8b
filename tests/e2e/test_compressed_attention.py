"""DeepSeek-V4 in contexts in which its index has to choose, in batches, going back, from prefixes, against
transformers in float32 on the bundle's dequantised weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.open_backend import open_backend
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

TOKENS = np.random.default_rng(8).integers(0, 256, 150).tolist()
OTHERS = np.random.default_rng(9).integers(0, 256, 40).tolist()
CPU: dict[str, Any] = {"device": "cpu", "context": 160, "threads": 1, "prefault": False}
FLOAT: dict[str, Any] = {"activations": "float32", "kv_dtype": "f32"}
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 tokens have 37 entries, of which queries see 5: each query's are laid side by side."""
    return tiny("deepseek_v4", tmp_path_factory.mktemp("v4") / "hf")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "model.krasis"
    arguments = [str(checkpoint), "-o", str(out), "--gpu-group", "64", "--quiet", "--force-text"]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "on the CPU only" in done.output
    return out


@pytest.fixture(scope="module")
def expected(bundle: Path, checkpoint: Path) -> np.ndarray:
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "cpu"))
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return transformers_logits(write_checkpoint(state, config, bundle.parent / "dequantised"), TOKENS)


@pytest.mark.parametrize(
    ("changes", "limit"), [({}, 2e-2), ({"kv_dtype": "int8"}, 3e-2), (FLOAT, 1e-3)], ids=str
)
def test_logits_equal_transformers(
    bundle: Path,
    expected: np.ndarray,
    relative_error: RelativeError,
    record_property: Callable[[str, object], None],
    changes: dict[str, Any],
    limit: float,
) -> None:
    """At once, and in pieces that end in the middle of windows."""
    with Engine.open(bundle, EngineSettings(**CPU | changes)) as engine:
        whole = engine.prefill(TOKENS, all_logits=True)
        record_property("relative error", relative_error(whole, expected))
        assert relative_error(whole, expected) <= limit
        engine.reset()
        parts = [engine.prefill(TOKENS[begin:end], all_logits=True) for begin, end in ((0, 3), (3, 77))]
        parts += [engine.decode(token)[None] for token in TOKENS[77:100]]
        parts += [engine.prefill(TOKENS[100:], all_logits=True)]
    assert relative_error(np.concatenate(parts), expected) <= limit


def test_goes_back_to_any_token(bundle: Path, expected: np.ndarray, relative_error: RelativeError) -> None:
    """What other tokens left behind it, whole entries too, is not seen."""
    with Bundle.open(bundle) as opened:
        backend = open_backend(opened, EngineSettings(**CPU | FLOAT))
        slot = backend.state.open()
        backend.run(batch_of([(slot, 0, TOKENS[:120], "none")]))
        for position in range(119, 80, -1):
            assert backend.state.restorable(slot, position) == position
            backend.state.rewind(slot, position)
            backend.run(batch_of([(slot, position, OTHERS[: 120 - position], "none")]))
            backend.state.rewind(slot, position)
            found = backend.run(batch_of([(slot, position, TOKENS[position:120], "all")]))
            assert relative_error(found, expected[position:120]) <= 1e-3
        backend.close()


def test_sequences_of_a_batch_get_the_bits_of_one_alone(bundle: Path) -> None:
    """Also one that is computed between the layers of another's prompt: their tokens choose experts."""
    lengths = (111, 10, 47)
    with Bundle.open(bundle) as opened:
        backend = open_backend(opened, EngineSettings(**CPU, slots=3))
        slots = [backend.state.open() for _ in range(3)]
        steps = []
        for slot, length in zip(slots, lengths, strict=True):
            backend.run(batch_of([(slot, 0, TOKENS[:length], "none")]))
            steps.append((slot, length, TOKENS[length : length + 1], "last"))
        alone = []
        for step in steps:
            alone.append(backend.run(batch_of([step])).copy())
            backend.state.rewind(step[0], step[1])
        np.testing.assert_array_equal(backend.run(batch_of(steps)), np.concatenate(alone))
        prompt = (slots[2], 48, TOKENS[48:90], "all")
        quiet = backend.run(batch_of([prompt])).copy()
        backend.state.rewind(slots[2], 48)
        backend.state.rewind(slots[0], lengths[0])
        found = []

        def decode(layer: int, _: int) -> None:
            backend.layer_done = None
            found.append(backend.run(batch_of(steps[:1])).copy())
            backend.layer_done = decode

        backend.layer_done = decode
        np.testing.assert_array_equal(backend.run(batch_of([prompt])), quiet)
        backend.layer_done = None
        np.testing.assert_array_equal(found, [alone[0]] * 5)  # behind each layer
        backend.close()


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_a_saved_prefix_ends_within_windows(
    bundle: Path, expected: np.ndarray, relative_error: RelativeError, tmp_path: Path, kv_dtype: str
) -> None:
    """Both backends read each other's."""
    settings = EngineSettings(**CPU, kv_dtype=kv_dtype)
    in_numpy = EngineSettings(**CPU, kv_dtype=kv_dtype, activations="float32")
    bits = []
    for one, name in ((settings, "a.kv"), (in_numpy, "b.kv")):
        with Engine.open(bundle, one) as engine:
            engine.prefill(TOKENS[:61])
            engine.save_prefix(tmp_path / name)
            bits.append(engine.prefill(TOKENS[61:], all_logits=True))
    with Engine.open(bundle, settings) as engine:
        engine.load_prefix(tmp_path / "a.kv")
        np.testing.assert_array_equal(engine.prefill(TOKENS[61:], all_logits=True), bits[0])
        engine.load_prefix(tmp_path / "b.kv")
        assert relative_error(engine.prefill(TOKENS[61:], all_logits=True), expected[61:]) <= 3e-2


def test_a_gpu_refuses_it_by_name(bundle: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="CSA, HCA"):
        Engine.open(bundle, EngineSettings(device="double", context=64, threads=1, prefault=False))


def test_its_choice_and_its_windows_are_what_is_compared(
    checkpoint: Path, expected: np.ndarray, relative_error: RelativeError, tmp_path: Path
) -> None:
    """Where all entries are chosen, or the window is longer, the logits are others from there on."""
    for changes, first in (({"index_topk": 100}, 24), ({"sliding_window": 24}, 17)):
        config = json.loads((checkpoint / "config.json").read_text("utf-8")) | changes
        name = next(iter(changes))
        folder, out = tmp_path / name, tmp_path / f"{name}.krasis"
        folder.mkdir()
        for path in checkpoint.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        arguments = [str(folder), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text"]
        assert CliRunner().invoke(convert, arguments, catch_exceptions=False).exit_code == 0
        with Engine.open(out, EngineSettings(**CPU | FLOAT)) as engine:
            found = engine.prefill(TOKENS, all_logits=True)
        assert relative_error(found[: first - 1], expected[: first - 1]) <= 1e-3
        assert relative_error(found[first:], expected[first:]) >= 3e-2
