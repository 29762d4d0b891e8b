"""Keys and values of some layers in the host's memory: on the double, whose order checks see each copy, or a
real GPU. What is computed has the bits that it has with all in VRAM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError
from krasis.runtime.gpu import host_kv, parts
from krasis.runtime.host.environment import probe_memory
from krasis.runtime.planning import Workload, sizes_of_bundle
from krasis.runtime.planning.planner import least_vram_bytes
from tests.support.tiny_checkpoints import tiny

TOKENS = np.random.default_rng(8).integers(0, 203, 60).tolist()
SETTINGS = {"context": 96, "gpu_dtype": "f16", "vram_bytes": 2**30}
ALL = 1000  # layers: more than there are
CASES = [("gpt_oss", "int8"), ("deepseek_v2", "f16")]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a family's tiny model."""

    def bundle(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        arguments = [str(tiny(family, folder / "hf")), "-o", str(folder / "b.krasis"), "--quiet"]
        arguments += ["--gpu-group", "64", "--force-text"]
        done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return folder / "b.krasis"

    return bundle


def on_host(engine: Any) -> int:
    """Layers whose keys and values are."""
    return sum(part is not None and part.on_host for part in engine._backend._parts.model.cache.parts)


def conversation(engine: Any, prefix: Path) -> list[np.ndarray]:
    """Logits of prompts after prefixes, of tokens, after going back, and from a file."""
    found = [engine.prefill(TOKENS[:20], all_logits=True), engine.prefill(TOKENS[20:33], all_logits=True)]
    found += [engine.decode(token)[None].copy() for token in TOKENS[33:36]]
    engine.save_prefix(prefix)
    found.append(engine.prefill(TOKENS[36:50], all_logits=True))
    if engine._backend.state.restorable(0, 30) == 30:
        engine.truncate(30)
        found.append(engine.prefill(TOKENS[40:44], all_logits=True))
    engine.reset()
    engine.load_prefix(prefix)
    layers = range(len(engine.bundle.spec.layers))
    found += [rows.copy() for layer in layers for rows in engine._backend.state.export(0, layer, 36)]
    found += [engine.decode(TOKENS[50])[None].copy(), engine.prefill(TOKENS[51:60], all_logits=True)]
    return found


@pytest.mark.parametrize(("family", "kv_dtype"), CASES)
def test_bits_do_not_depend_on_the_place(
    bundles: Callable[[str], Path],
    open_gpu: Callable[..., Any],
    gpu_kind: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    kv_dtype: str,
) -> None:
    """Windows, sinks and 8 bits; latents. (``test_gpu_between`` has slots, and some layers.)"""
    monkeypatch.setattr(parts, "_open_residency", lambda *_, **__: None)  # the CPU computes experts
    results, path = [], bundles(family)
    for seed, count in enumerate((0, ALL)):
        engine = open_gpu(path, seed=seed, host_kv_layers=count, kv_dtype=kv_dtype, **SETTINGS)
        cache = engine._backend._parts.model.cache
        movable = sum(part is not None and part.window is None for part in cache.parts)
        assert on_host(engine) == min(count, movable)
        results.append(conversation(engine, tmp_path / f"{count}.kv"))
        if gpu_kind == "double":  # a token reads them ahead
            names = engine._backend._device.executed_orders
            assert ("move_positions on stream compute" in names) == (count > 0)
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def four_layers(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "vocab_size": 64}
    config = make_config(num_hidden_layers=4, max_position_embeddings=1024, **sizes)
    return make_bundle(config, gpu_group=64)


def short_vram(bundle: Path, context: int) -> int:
    """A layer's keys and values less than is needed with all of them in VRAM."""
    with Bundle.open(bundle) as opened:
        sizes = sizes_of_bundle(opened.manifest)
    work = Workload(context, context, "bf16")
    return least_vram_bytes(sizes, work) - sizes.kv_bytes(context, "bf16") // 4


def test_a_context_too_long_for_vram_is_granted_in_ram(
    four_layers: Path, open_gpu: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"context": 1024, "vram_bytes": short_vram(four_layers, 1024)}
    with caplog.at_level(logging.WARNING):
        engine = open_gpu(four_layers, **settings)
    assert on_host(engine) == 3  # two staging buffers cost as much as two layers
    assert "VRAM has no room for keys and values of 1,024 tokens; in RAM are those of" in caplog.text
    plan = engine._backend._parts.plan
    cache = engine._backend._parts.model.cache
    assert plan.placement.host_kv_bytes == cache.host_memory.nbytes
    assert plan.placement.kv_bytes == cache.memory.nbytes + cache.staging.memory.nbytes
    engine.prefill([3, 1, 4, 1, 5])
    assert np.isfinite(engine.decode(3)).all()


def test_ram_that_is_short_is_told_before_anything_is_pinned(
    four_layers: Path, open_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(probe_memory(), available_bytes=2**20)
    monkeypatch.setattr(host_kv, "probe_memory", lambda: short)
    with pytest.raises(ResourceError, match="no RAM for the keys and values that VRAM has no room for"):
        open_gpu(four_layers, context=64, host_kv_layers=1, vram_bytes=2**30)
