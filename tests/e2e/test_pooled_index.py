"""GLM-5.3 in contexts in which its index over pools has to choose, in batches, between layers, from prefixes,
against transformers in float32 on the bundle's dequantised weights. Of its states see ``test_gated_delta``.
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
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.open_backend import open_backend
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import FIELDS, tiny

BLOCK, BUDGET = 8, 40
TOKENS = np.random.default_rng(8).integers(0, 256, 150).tolist()
CPU: dict[str, Any] = {"device": "cpu", "context": 160, "threads": 1, "prefault": False}
FLOAT: dict[str, Any] = {"activations": "float32", "kv_dtype": "f32"}
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with an index of their own, one that takes the choice of the one before, and one without."""
    folder = tmp_path_factory.mktemp("glm5") / "hf"
    return tiny("glm5_next", folder, index_kpool=BLOCK, index_topk=BUDGET)


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
    ("changes", "limit"), [({}, 2e-2), ({"kv_dtype": "int8"}, 2e-2), (FLOAT, 1e-3)], ids=str
)
def test_logits_equal_transformers(
    bundle: Path, expected: np.ndarray, relative_error: RelativeError, changes: dict[str, Any], limit: float
) -> None:
    """At once, and in pieces that end in the middle of pools."""
    with Engine.open(bundle, EngineSettings(**CPU | changes)) as engine:
        whole = engine.prefill(TOKENS, all_logits=True)
        assert relative_error(whole, expected) <= limit
        engine.reset()
        parts = [engine.prefill(TOKENS[begin:end], all_logits=True) for begin, end in ((0, 3), (3, 77))]
        parts += [engine.decode(token)[None] for token in TOKENS[77:100]]
        parts += [engine.prefill(TOKENS[100:], all_logits=True)]
    if changes == FLOAT:
        assert relative_error(np.concatenate(parts), expected) <= limit
    else:
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_its_choice_is_what_is_compared(
    checkpoint: Path, expected: np.ndarray, relative_error: RelativeError, tmp_path: Path
) -> None:
    """Where all is chosen the logits are others, but for the first tokens."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["text_config"]["index_topk"] = 20 * BLOCK
    out = tmp_path / "all.krasis"
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [str(folder), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text"]
    assert CliRunner().invoke(convert, arguments, catch_exceptions=False).exit_code == 0
    with Engine.open(out, EngineSettings(**CPU | FLOAT)) as engine:
        found = engine.prefill(TOKENS, all_logits=True)
    most = BUDGET + BLOCK - 1
    assert relative_error(found[:most], expected[:most]) <= 1e-3
    assert relative_error(found[most:], expected[most:]) >= 3e-2


def test_sequences_of_a_batch_get_the_bits_of_one_alone(bundle: Path) -> None:
    """Also one that is computed between the layers of another's prompt, before and beyond the budget."""
    with Bundle.open(bundle) as opened:
        backend = open_backend(opened, EngineSettings(**CPU, slots=3))
        slots = [backend.state.open() for _ in range(3)]
        alone = backend.run(batch_of([(slots[0], 0, TOKENS, "all")])).copy()
        lengths = (111, 10, 47)  # 47: where the next token is the first that has to choose
        for slot, length in zip(slots, lengths, strict=True):
            backend.state.rewind(slot, 0)
            backend.run(batch_of([(slot, 0, TOKENS[:length], "none")]))
        steps = [
            (slot, length, TOKENS[length : length + 1], "last")
            for slot, length in zip(slots, lengths, strict=True)
        ]
        np.testing.assert_array_equal(backend.run(batch_of(steps)), alone[list(lengths)])
        found = []

        def decode(layer: int, _: int) -> None:
            if layer <= 3:
                backend.layer_done = None
                at = 111 + layer
                found.append(backend.run(batch_of([(slots[0], at, [TOKENS[at]], "last")])).copy())
                backend.layer_done = decode

        backend.layer_done = decode
        prompt = backend.run(batch_of([(slots[2], 48, TOKENS[48:90], "all")]))
        backend.layer_done = None
        np.testing.assert_array_equal(prompt, alone[48:90])
        np.testing.assert_array_equal(np.concatenate(found), alone[112:115])
        backend.close()


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_a_saved_prefix_holds_keys_gates_and_pools(
    bundle: Path, expected: np.ndarray, relative_error: RelativeError, tmp_path: Path, kv_dtype: str
) -> None:
    """Some tokens of a pool that the prompt behind it makes whole; kernels and NumPy read each other's."""
    settings = EngineSettings(**CPU, kv_dtype=kv_dtype)
    in_numpy = EngineSettings(**CPU, kv_dtype=kv_dtype, activations="float32")
    for one, name in ((settings, "a.kv"), (in_numpy, "b.kv")):
        with Engine.open(bundle, one) as engine:
            engine.prefill(TOKENS[:61])
            engine.save_prefix(tmp_path / name)
            found = engine.prefill(TOKENS[61:], all_logits=True)
            if name == "a.kv":
                bits = found
    with Engine.open(bundle, settings) as engine:
        engine.load_prefix(tmp_path / "a.kv")
        np.testing.assert_array_equal(engine.prefill(TOKENS[61:], all_logits=True), bits)
        engine.load_prefix(tmp_path / "b.kv")
        assert relative_error(engine.prefill(TOKENS[61:], all_logits=True), expected[61:]) <= 2e-2
    with Engine.open(bundle, in_numpy) as engine:
        engine.load_prefix(tmp_path / "a.kv")
        assert relative_error(engine.prefill(TOKENS[61:], all_logits=True), expected[61:]) <= 2e-2


def test_the_cpu_has_no_limit_of_blocks(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        assert opened.spec.densest_context == BUDGET + BLOCK - 1
        assert opened.spec.block_context is None
        assert opened.spec.max_context == FIELDS["glm5_next"].get("max_position_embeddings", 512)
