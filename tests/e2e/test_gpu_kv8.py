"""Keys and values of 8 bits on a GPU, on the double or a real one: windows, sinks and heads of several sizes
against transformers in float32 on the bundle's dequantised weights; in files, which CPUs share; in slots.
"""

from __future__ import annotations

import json
import logging
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
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
TOKENS = np.random.default_rng(8).integers(0, 203, 45).tolist()
LIMIT = 1e-2
OTHER_EXPERTS = 0.2  # of 8 bits on the CPU, of 4 in VRAM: seen 0.1
INT8_LIMIT = 2e-2  # decode has the CPU's experts, whose activations are int8


def converted(family: str, folder: Path) -> Path:
    arguments = [str(tiny(family, folder / "hf")), "-o", str(folder / "b.krasis"), "--quiet"]
    done = CliRunner().invoke(
        convert, [*arguments, "--gpu-group", "64", "--force-text"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return folder / "b.krasis"


@pytest.fixture(scope="module", params=["gpt_oss", "gemma4"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_equal_transformers(
    windowed: Path, open_gpu: Callable[..., Any], relative_error: RelativeError
) -> None:
    config = json.loads((windowed.parent / "hf" / "config.json").read_text("utf-8"))
    with Bundle.open(windowed) as opened:
        state = dequantised_state(load_weights(opened, "gpu"))
    folder = write_checkpoint(state, config, windowed.parent / "gpu")
    expected = transformers_logits(folder, TOKENS)
    engine = open_gpu(windowed, context=64, gpu_dtype="f16", kv_dtype="int8", vram_bytes=2**30)
    assert relative_error(engine.prefill(TOKENS, all_logits=True), expected) <= LIMIT
    engine.truncate(20)
    found = [engine.prefill(TOKENS[20:40], all_logits=True)]
    assert relative_error(found[0], expected[20:40]) <= LIMIT
    found += [engine.decode(token)[None].copy() for token in TOKENS[40:]]
    assert relative_error(np.concatenate(found), expected[20:]) <= INT8_LIMIT


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    return make_bundle(make_config(), seed=3, gpu_group=64)


def exported(engine: Any) -> list[list[np.ndarray]]:
    """What both layers keep of 30 positions."""
    state = engine._backend.state
    return [[rows.copy() for rows in state.export(0, layer, 30)] for layer in range(2)]


def test_files_are_those_of_a_cpu(
    bundle: Path, open_gpu: Callable[..., Any], tmp_path: Path, relative_error: RelativeError
) -> None:
    settings = {"context": 64, "kv_dtype": "int8"}
    on_gpu = open_gpu(bundle, gpu_dtype="f16", **settings)
    assert "int8 KV cache" in on_gpu.description
    on_gpu.prefill(TOKENS[:30])
    on_gpu.save_prefix(tmp_path / "gpu.kv")
    sent = exported(on_gpu)
    expected = [on_gpu.decode(token).copy() for token in TOKENS[30:33]]
    with Engine.open(bundle, EngineSettings(device="cpu", threads=2, prefault=False, **settings)) as on_cpu:
        on_cpu.load_prefix(tmp_path / "gpu.kv")
        np.testing.assert_equal(exported(on_cpu), sent)
        for token, logits in zip(TOKENS[30:33], expected, strict=True):
            assert relative_error(on_cpu.decode(token), logits) <= OTHER_EXPERTS
        on_cpu.reset()
        on_cpu.prefill(TOKENS[:30])
        on_cpu.save_prefix(tmp_path / "cpu.kv")
        kept = exported(on_cpu)
    on_gpu.load_prefix(tmp_path / "cpu.kv")
    np.testing.assert_equal(exported(on_gpu), kept)
    on_gpu.load_prefix(tmp_path / "gpu.kv")
    found = [on_gpu.decode(token).copy() for token in TOKENS[30:33]]
    np.testing.assert_array_equal(found, expected)


def test_half_the_memory_in_every_slot(
    bundle: Path, open_gpu: Callable[..., Any], relative_error: RelativeError
) -> None:
    settings = {"context": 64, "slots": 3, "gpu_dtype": "bf16", "vram_bytes": 2**30}
    wide, narrow = (open_gpu(bundle, kv_dtype=kind, **settings)._backend for kind in ("f16", "int8"))
    taken = [backend._parts.model.cache.memory.nbytes for backend in (wide, narrow)]
    assert taken[1] / taken[0] == (32 + 4) / (2 * 32)
    plans = [backend._parts.plan for backend in (wide, narrow)]
    assert [plan.workload.kv_dtype for plan in plans] == ["bf16", "int8"]
    for plan, kind in zip(plans, ("bf16", "int8"), strict=True):
        others = 2 * plan.sizes.sequence_bytes(64, kind, "whole")
        assert plan.placement.kv_bytes == plan.sizes.gpu_kv_bytes(64, kind) + others
    found = []
    for backend in (wide, narrow):
        state = backend.state
        slots = [0, state.open(), state.open()]
        parts = [(slot, 0, TOKENS[: 9 + slot], "last") for slot in slots[:2]]
        rows = [backend.run(batch_of(parts)).copy()]
        for layer in range(2):  # as the server gives a prefix to another sequence
            state.import_(slots[2], layer, *state.export(slots[1], layer, 10))
        ends = [(0, 9), (1, 10), (2, 10)]
        rows.append(backend.run(batch_of([(slot, end, [TOKENS[20]], "last") for slot, end in ends])).copy())
        np.testing.assert_array_equal(rows[1][1], rows[1][2])
        found.append(np.concatenate(rows))
    assert relative_error(found[1], found[0]) <= INT8_LIMIT


def test_latents_stay_in_16_bits(
    tmp_path: Path, open_gpu: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = converted("deepseek_v2", tmp_path)
    with caplog.at_level(logging.WARNING):
        backend = open_gpu(bundle, context=64, kv_dtype="int8", vram_bytes=2**30)._backend
    assert (backend.kv_dtype, backend.state.dtype) == ("bf16", "bf16")
    assert "--kv-dtype int8: a GPU keeps this model's latents in bf16" in caplog.text
