"""What the tiny Nemotron-H of ``test_families`` lacks: experts between two projections, as Nemotron-3 Super
has them, and layers of an MLP alone. transformers computes in float32 on the bundle's dequantised weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.models.state import SNAPSHOTS, fixed_bytes
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.weights import load_weights
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny
from tests.support.tiny_ggufs import tiny_gguf

RelativeError = Callable[[np.ndarray, np.ndarray], float]
OpenGpu = Callable[..., Any]
TOKENS = np.random.default_rng(8).integers(0, 256, 40).tolist()


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_experts_between_two_projections(
    kind: str,
    tmp_path: Path,
    relative_error: RelativeError,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
) -> None:
    blocks = ["mamba", "moe", "attention", *(["mlp"] if kind == "hf" else []), "moe"]
    changes = {
        "mamba_num_heads": 12,
        "layers_block_type": blocks,
        "moe_latent_size": 64,
        "time_step_min": 1e-9,
    }
    out, config = converted(kind, tmp_path, **changes)
    with Bundle.open(out) as bundle:
        state = dequantised_state(load_weights(bundle, "cpu"))
    expected = transformers_logits(write_checkpoint(state, config, tmp_path / "dequantised"), TOKENS)
    with Bundle.open(out) as bundle:
        copies_bytes = SNAPSHOTS * fixed_bytes(bundle.spec)
    streamed_bytes = vram_for(out, 64, group_experts=2) + copies_bytes
    cases = (("f16", None, 2e-3), ("bf16", None, 1.5e-2), ("f16", streamed_bytes, 2e-2))
    _check_on_gpu(out, config, tmp_path / "dequantised-gpu", relative_error, open_gpu, cases)
    for limit, numbers in ((2e-2, {}), (1e-3, {"activations": "float32", "kv_dtype": "f32"})):
        settings = EngineSettings(device="cpu", context=64, threads=1, prefault=False, **numbers)
        with Engine.open(out, settings) as engine:
            whole = engine.prefill(TOKENS, all_logits=True)
            assert relative_error(whole, expected) <= limit
            engine.reset()
            parts = [engine.prefill(TOKENS[:30], all_logits=True)]
            parts += [engine.decode(token)[None] for token in TOKENS[30:]]
            assert relative_error(np.concatenate(parts), expected) <= limit


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_on_a_gpu(kind: str, tmp_path: Path, relative_error: RelativeError, open_gpu: OpenGpu) -> None:
    """Experts without projections, and heads whose channels a GPU's products can add up."""
    least_step = {"time_step_min": 1e-9} if kind == "gguf" else {}  # which GGUFs do not keep
    out, config = converted(kind, tmp_path, mamba_num_heads=12, **least_step)
    cases = (("f16", None, 2e-3), ("bf16", None, 1.5e-2))
    _check_on_gpu(out, config, tmp_path / "dequantised", relative_error, open_gpu, cases)


def converted(kind: str, folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A bundle of a tiny checkpoint, or of its GGUF, and its config."""
    source = tiny("nemotron_h", folder / "hf", **changes)
    config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
    if kind == "gguf":
        source = tiny_gguf(source, folder / "model.gguf", experts="Q8_0")
    out = folder / "b.krasis"
    arguments = [str(source), "-o", str(out), "--gpu-group", "64", "--quiet", "--force-text"]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out, config


def _check_on_gpu(
    bundle: Path,
    config: dict[str, Any],
    folder: Path,
    relative_error: RelativeError,
    open_gpu: OpenGpu,
    cases: Iterable[tuple[str, int | None, float]],
) -> None:
    """cases: dtype, VRAM and limit of the error. With all VRAM the GPU decodes alone; else no expert has a
    place, and decode's are the CPU's, with activations of 8 bits."""
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "gpu"))
    expected = transformers_logits(write_checkpoint(state, config, folder), TOKENS)
    for dtype, vram_bytes, limit in cases:
        engine = open_gpu(bundle, context=64, gpu_dtype=dtype, vram_bytes=vram_bytes)
        parts = [engine.prefill(TOKENS[:30], all_logits=True)]
        parts += [engine.decode(token)[None] for token in TOKENS[30:]]
        assert relative_error(np.concatenate(parts), expected) <= limit
        assert ("CPU" in engine._backend._parts.decoder.description) == (vram_bytes is not None)
