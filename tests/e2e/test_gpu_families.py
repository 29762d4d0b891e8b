"""Bundles of families with flat norms, dense layers and shared experts on the device's double: experts are
streamed in prefill and handed over to the CPU in decode; transformers computes in float32 on the bundle's own
dequantised weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.convert.conversion import convert as run
from krasis.convert.conversion import prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime import EngineSettings
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.gpu.opening import refuse
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
FAMILIES = ("olmoe", "glm4_moe")
TOKENS = np.random.default_rng(3).integers(0, 320, 23).tolist()
INT8_LIMIT = 2e-2
LIMIT = 1.5e-3
"""Of f16, seen: 1.2e-3. bf16 rounds enough to turn near-ties of these random routers: see runtime/gpu."""


@dataclass
class Model:
    """A bundle, and transformers' logits of TOKENS with its GPU tier's experts; config: of the source."""

    bundle: Path
    config: Path
    expected: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A width that the kernels take.
    return tiny(request.param, tmp_path_factory.mktemp(request.param) / "hf", intermediate_size=128)


def convert(source: Path, out: Path) -> Path:
    reporter, settings = Reporter(0), ConvertSettings(num_threads=2, gpu_group=64)
    run(prepare([source], out, settings, reporter), reporter)
    return out


def reference(bundle: Path, config: Path, tier: str) -> np.ndarray:
    """transformers' logits on the dequantised weights, with a tier's experts."""
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, tier))
    fields = json.loads((config / "config.json").read_text("utf-8"))
    folder = write_checkpoint(state, fields, bundle.with_name(f"{bundle.name}-{tier}-dequantised"))
    return transformers_logits(folder, TOKENS)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    bundle = convert(checkpoint, checkpoint.with_name("model.krasis"))
    return Model(bundle, checkpoint, reference(bundle, checkpoint, "gpu"))


def test_experts_are_streamed_and_handed_over(
    model: Model,
    open_gpu: Callable[..., Any],
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    relative_error: RelativeError,
) -> None:
    only_path("streamed")
    vram_bytes = vram_for(model.bundle, 64, group_experts=3)
    engine = open_gpu(
        model.bundle,
        seed=8,
        context=64,
        gpu_dtype="f16",
        vram_bytes=vram_bytes,
    )
    assert relative_error(engine.prefill(TOKENS, all_logits=True), model.expected) <= LIMIT
    with Bundle.open(model.bundle) as opened:
        num_layers = sum(layer.experts is not None for layer in opened.spec.layers)
    assert engine._backend.last_prefill.num_groups == 3 * num_layers  # of 8 experts; no group of dense layers
    engine.reset()
    found = [engine.prefill(TOKENS[:1]), *(engine.decode(token).copy() for token in TOKENS[1:])]
    expected = reference(model.bundle, model.config, "cpu")
    # Of most tokens: INT8 activations turn a near-tie of these random routers here and there.
    errors = [relative_error(row, wanted) for row, wanted in zip(np.stack(found), expected, strict=True)]
    assert np.median(errors) <= INT8_LIMIT


def test_a_width_that_the_kernels_do_not_take(tmp_path: Path) -> None:
    source = tiny("glm4_moe", tmp_path / "hf", intermediate_size=96)
    bundle = convert(source, tmp_path / "out.krasis")
    with Bundle.open(bundle) as opened, pytest.raises(UnsupportedModelError, match=r"MLP's width \(got 96"):
        refuse(opened, EngineSettings(device="double"))
