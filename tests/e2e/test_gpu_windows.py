"""Windows in rings on a GPU, with prompts longer than the rings: on the double, whose order checks see each
copy, or a real GPU; against transformers, and against a cache that keeps all positions.
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
from krasis.formats.errors import NativeError
from krasis.formats.models.state import TAIL_TOKENS, copy_bytes, sequence_bytes
from krasis.runtime.batch import batch_of, one_sequence
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.serving.state_copy import StateCopier
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
OpenGpu = Callable[..., Any]
TOKENS = np.random.default_rng(15).integers(0, 203, 300).tolist()  # rings have 128 positions
CONTEXT = 512


@pytest.fixture(scope="module", params=["gpt_oss", "gemma4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    arguments = [str(tiny(request.param, folder / "hf")), "-o", str(folder / "b.krasis"), "--quiet"]
    arguments += ["--gpu-group", "64", "--force-text"]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "b.krasis"


@pytest.fixture(scope="module")
def expected(bundle: Path) -> np.ndarray:
    config = json.loads((bundle.parent / "hf" / "config.json").read_text("utf-8"))
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "gpu"))
    return transformers_logits(write_checkpoint(state, config, bundle.parent / "dequantised"), TOKENS)


@pytest.fixture
def open_rings(bundle: Path, open_gpu: OpenGpu) -> OpenGpu:
    """open_rings(**settings): an engine whose experts are all in VRAM."""
    defaults = {"context": CONTEXT, "gpu_dtype": "f16", "vram_bytes": 2**30}
    return lambda **settings: open_gpu(bundle, **defaults | settings)


def logits_of(backend: Any, chunks: list[int], slot: int, start: int = 0) -> np.ndarray:
    """Of TOKENS from start on, in chunks of these sizes; of one token alone decoded."""
    out = []
    for size in chunks:
        piece = np.array(TOKENS[start : start + size])
        out.append(backend.run(one_sequence(piece, start, "all" if size > 1 else "last", slot)).copy())
        start += size
    return np.concatenate(out)


def test_logits_equal_transformers_beyond_the_ring(
    open_rings: OpenGpu, expected: np.ndarray, relative_error: RelativeError
) -> None:
    engine = open_rings(slots=2)
    backend = engine._backend
    assert backend.state.keeps_windows
    assert relative_error(logits_of(backend, [300], backend.state.open()), expected) <= 5e-3
    backend.state.close(1)
    pieces = logits_of(backend, [100, 7, 129, *[1] * 64], backend.state.open())
    assert relative_error(pieces, expected) <= 5e-3


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_a_ring_has_the_bits_of_a_whole_cache_in_fewer_bytes(
    open_rings: OpenGpu, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    chunks, results, sizes = [130, 1, 1, 90, 65, *[1] * 13], [], []
    for windows in ("rings", "whole"):
        with monkeypatch.context() as patch:
            places = [f"planning.{module}" for module in ("kv_form", "sizes", "host_kv")]
            for place in (*places, "gpu.parts"):
                patch.setattr(f"krasis.runtime.{place}.gpu_windows", lambda *_, kept=windows: kept)
            engine = open_rings(kv_dtype=kv_dtype)
            parts = engine._backend._parts
            results.append(logits_of(engine._backend, chunks, 0))
            cache, spec = parts.model.cache, parts.model.spec
            held = cache.memory.nbytes + cache.copies.nbytes
            assert parts.plan.placement.kv_bytes == held + cache.scratch.nbytes
            item_bytes = 1 if kv_dtype == "int8" else 2
            kept = sequence_bytes(spec, CONTEXT, item_bytes, windows)
            assert held == kept + (4 * copy_bytes(spec, CONTEXT, item_bytes) if windows == "rings" else 0)
            sizes.append(cache.memory.nbytes)
    np.testing.assert_array_equal(*results)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("at", [240, 90])  # in the ring; a copy's, and before it
def test_goes_back_within_the_ring_and_to_copies(
    open_rings: OpenGpu, relative_error: RelativeError, at: int
) -> None:
    backend = open_rings()._backend
    state, slot = backend.state, 0
    first = logits_of(backend, [100], slot)
    state.checkpoint(slot)
    whole = np.concatenate([first, logits_of(backend, [200], slot, 100)])
    assert state.restorable(slot, at) == at
    assert state.restorable(slot, 50) == 0
    with pytest.raises(NativeError, match="gone back to"):
        state.rewind(slot, 50)
    for _ in range(2):
        state.rewind(slot, at)
        state.checkpoint(slot)
        assert relative_error(logits_of(backend, [300 - at], slot, at), whole[at:]) <= 2e-3
        state.rewind(slot, at)
        backend.run(one_sequence(np.array([7] * 200), at, "none", slot))  # another turn, over the whole ring


def test_sequences_of_one_batch_get_what_each_gets_alone(
    open_rings: OpenGpu, relative_error: RelativeError
) -> None:
    """Long ones beside short ones and single tokens, then a token of each."""
    backend = open_rings(slots=5)._backend
    slots = [0, *(backend.state.open() for _ in range(4))]
    whole = logits_of(backend, [300], slots[4])
    backend.run(one_sequence(np.array(TOKENS[:140]), 0, "none", slots[0]))
    starts, ends = (140, 0, 0, 0), (298, 1, 150, 70)
    parts = [(s, a, TOKENS[a:b], "all") for s, a, b in zip(slots, starts, ends, strict=False)]
    together = backend.run(batch_of(parts)).copy()
    wanted = [whole[a:b] for a, b in zip(starts, ends, strict=True)]
    assert relative_error(together, np.concatenate(wanted)) <= 2e-3
    for step in range(2):
        rows = [
            (s, b + step, TOKENS[b + step : b + step + 1], "last") for s, b in zip(slots, ends, strict=False)
        ]
        found = backend.run(batch_of(rows))
        assert relative_error(found, whole[[b + step for b in ends]]) <= 2e-3


def test_a_pass_that_breaks_off_leaves_where_it_began(
    open_rings: OpenGpu, relative_error: RelativeError
) -> None:
    engine = open_rings()
    backend = engine._backend
    whole = logits_of(backend, [150, 150], 0)
    backend.state.rewind(0, 0)
    engine.prefill(TOKENS[:150])

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    backend.layer_done = stop
    with pytest.raises(KeyboardInterrupt):
        backend.run(one_sequence(np.array(TOKENS[150:]), 150, "all"))
    backend.layer_done = None
    assert backend.state.restorable(0, 150) == 150
    assert relative_error(logits_of(backend, [150], 0, 150), whole[150:]) <= 2e-3


def test_a_saved_prefix_holds_the_ends_of_windows(
    bundle: Path, open_rings: OpenGpu, relative_error: RelativeError, tmp_path: Path
) -> None:
    """It goes on in another slot of rings, and on the CPU, and the CPU's here."""
    from safetensors import safe_open

    path = tmp_path / "a.kv"
    engine = open_rings()
    engine.prefill(TOKENS)
    engine.save_prefix(path)
    expected = [engine.decode(token).copy() for token in (5, 6)]
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"keys", "values", "window_keys", "window_values", "tokens"}
        assert file.get_tensor("window_keys").shape[2] == 16
        assert file.get_tensor("keys").shape[2] == 300
    other = open_rings(seed=1, context=320)
    other.prefill(TOKENS[100:])
    other.load_prefix(path)
    np.testing.assert_array_equal([other.decode(token).copy() for token in (5, 6)], expected)
    assert other.keep_prefix([*TOKENS[:299], 1, 2]) == 299  # the last token again
    from krasis.runtime import Engine, EngineSettings

    settings = EngineSettings(device="cpu", context=320, threads=1, prefault=False, kv_dtype="f16")
    with Engine.open(bundle, settings) as cpu:
        cpu.prefill(TOKENS)
        own = cpu.decode(5).copy()  # by experts of 8 bits and activations of 8 bits, unlike the GPU's
        cpu.load_prefix(path)
        assert relative_error(cpu.decode(5), own) <= 5e-2
        cpu.truncate(300)
        cpu.save_prefix(tmp_path / "cpu.kv")
    engine.load_prefix(tmp_path / "cpu.kv")
    np.testing.assert_array_equal(engine.decode(5), expected[0])


def test_conversations_on_a_server_get_what_each_gets_alone(
    open_rings: OpenGpu, relative_error: RelativeError
) -> None:
    """A slot's end goes to another slot and back."""
    engine = open_rings(slots=2)
    backend, state = engine._backend, engine._backend.state
    copier = StateCopier(state, len(engine.bundle.spec.layers))
    assert copier.keeps_tails
    whole = logits_of(backend, [200], 0)
    state.checkpoint(0)
    logits_of(backend, [100], 0, 200)
    other = state.open()
    before = 200 - TAIL_TOKENS
    assert copier.copy(0, other, before) == before  # the first position that the copy at 200 takes it back to
    again = logits_of(backend, [1, 1], other, before - 1)
    assert relative_error(again, whole[before - 1 : before + 1]) <= 2e-3
    assert copier.copy(0, other, 195) == 195
    layers = copier.export(0, 300)
    assert sum(a.nbytes + b.nbytes for a, b in layers) == copier.num_bytes(0, 300)
    wanted = logits_of(backend, [105], other, 195)
    assert copier.import_(0, copier.export(other, 300), 300, can_be_cut=False) == 300
    np.testing.assert_array_equal(logits_of(backend, [1], 0, 299), logits_of(backend, [1], other, 299))
    assert wanted.shape[0] == 105
