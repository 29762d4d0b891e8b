"""Every family that runs, from a checkpoint or a GGUF through the converter to logits on the CPU, in int8 and
float, and on the GPU's double: transformers computes them in float32 on the bundle's dequantised weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.registry import family_of_model_type
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cli.run import main as krasis_run
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.missing_kernels import GPU_RUNS, lacking
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import FIELDS, tiny
from tests.support.tiny_ggufs import tiny_gguf

TOKENS = np.random.default_rng(8).integers(0, 256, 45).tolist()
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module", params=FIELDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module", params=["hf", "gguf"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    out = checkpoint.parent / f"{request.param}.krasis"
    source = checkpoint
    if request.param == "gguf":
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        family = family_of_model_type(config["model_type"])
        if family is None or family.spec_from_gguf is None:
            pytest.skip("GGUFs of this family are not read")
        source = tiny_gguf(checkpoint, checkpoint.parent / "model.gguf", experts="Q8_0")
    arguments = [str(source), "-o", str(out), "--gpu-group", "64", "--quiet", "--force-text"]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def expected(bundle: Path, checkpoint: Path) -> Callable[[str], np.ndarray]:
    """Logits of all tokens with the experts of a tier."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if bundle.stem == "gguf" and "time_step_min" in config:  # of which llama.cpp knows nothing
        config["time_step_min"] = 0.0
    found: dict[str, np.ndarray] = {}

    def logits(tier: str) -> np.ndarray:
        if tier not in found:
            with Bundle.open(bundle) as opened:
                state = dequantised_state(load_weights(opened, tier))
            folder = write_checkpoint(state, config, bundle.parent / f"{bundle.stem}-{tier}")
            found[tier] = transformers_logits(folder, TOKENS)
        return found[tier]

    return logits


SETTINGS: dict[str, tuple[dict[str, Any], str, float]] = {
    "int8": ({"device": "cpu"}, "cpu", 2e-2),
    "float": ({"device": "cpu", "activations": "float32", "kv_dtype": "f32"}, "cpu", 1e-3),
    "gpu": ({"device": "double", "gpu_dtype": "f16", "vram_bytes": 2**30}, "gpu", 5e-3),
}
if os.environ.get("KRASIS_TEST_DEVICE") == "cuda":  # the same on a real GPU, and in its everyday type
    for dtype, bound in (("f16", 5e-3), ("bf16", 2e-2)):
        name = "gpu" if dtype == "f16" else "gpu, bf16"
        SETTINGS[name] = ({"device": "cuda", "gpu_dtype": dtype, "vram_bytes": 2**32}, "gpu", bound)


def _lacks_on_gpu(bundle: Path) -> str | None:
    """What the GPU has no kernels for, of families that run on the CPU alone."""
    with Bundle.open(bundle) as opened:
        return next((re.escape(one) for one in lacking(opened.spec, GPU_RUNS)), None)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_equal_transformers(
    bundle: Path,
    expected: Callable[[str], np.ndarray],
    relative_error: RelativeError,
    settings: str,
    record_property: Callable[[str, object], None],
) -> None:
    changes, tier, limit = SETTINGS[settings]
    if tier == "gpu" and (lack := _lacks_on_gpu(bundle)) is not None:
        with pytest.raises(UnsupportedModelError, match=lack):
            Engine.open(bundle, EngineSettings(context=64, threads=1, prefault=False, **changes))
        return
    with Engine.open(bundle, EngineSettings(context=64, threads=1, prefault=False, **changes)) as engine:
        whole = engine.prefill(TOKENS, all_logits=True)
        record_property("relative error", relative_error(whole, expected(tier)))
        assert relative_error(whole, expected(tier)) <= limit
        engine.reset()
        parts = [engine.prefill(TOKENS[begin:end], all_logits=True) for begin, end in ((0, 7), (7, 40))]
        parts += [engine.decode(token)[None] for token in TOKENS[40:]]
        found = np.concatenate(parts)
    # The GPU's hybrid decodes with the CPU's experts, whose activations are int8.
    assert relative_error(found, expected(tier)) <= max(limit, 2e-2 if tier == "gpu" else 0)


@pytest.mark.parametrize("bundle", ["hf"], indirect=True)
@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_goes_on_from_a_saved_prefix_with_the_same_bits(bundle: Path, tmp_path: Path, kv_dtype: str) -> None:
    settings = EngineSettings(device="cpu", context=64, threads=1, prefault=False, kv_dtype=kv_dtype)
    with Engine.open(bundle, settings) as engine:
        engine.prefill(TOKENS)
        engine.save_prefix(tmp_path / "a.kv")
        expected = [engine.decode(token) for token in (5, 6)]
    with Engine.open(bundle, settings) as engine:
        engine.prefill(TOKENS[20:])
        engine.load_prefix(tmp_path / "a.kv")
        assert engine.tokens == tuple(TOKENS)
        np.testing.assert_array_equal([engine.decode(token) for token in (5, 6)], expected)


@pytest.mark.parametrize("bundle", ["hf"], indirect=True)  # the GGUFs are written without a tokenizer
def test_the_command_answers(bundle: Path) -> None:
    options = {"--prompt": "abc", "--max-tokens": "4", "--device": "cpu", "--ctx": "64"}
    arguments = [str(bundle), "--raw", *(part for option in options.items() for part in option)]
    done = CliRunner().invoke(krasis_run, arguments)
    assert done.exit_code == 0, done.output
