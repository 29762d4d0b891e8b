"""Quantised checkpoints through the converter to logits: bundles are those of the checkpoint with what the
weights stand for, and transformers computes the same with those.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from quantised_checkpoints import is_projection, quantise
from twin_quantisers import SCHEMES, Quantised, Scheme

from krasis.convert.cli import main as convert
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.runtime import Engine, EngineSettings
from tests.support.random_weights import transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

TOKENS = np.random.default_rng(8).integers(0, 256, 45).tolist()
# Written by the libraries themselves, where they are installed: tests/support/foreign_quantisers.py.
FOREIGN = {
    "fp8-blocks": "transformers",
    "ct-fp8-block": "compressed_tensors",
    "ct-int4-g32": "compressed_tensors",
    "ct-nvfp4": "compressed_tensors",
    "ct-mxfp4": "compressed_tensors",
    "ct-mxfp8": "compressed_tensors",
    "modelopt-nvfp4": "modelopt",
    "gptq-act-order": "gptqmodel",
    "awq": "awq",
}
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "hf"
    return tiny("qwen3_moe", folder, num_hidden_layers=2, num_experts=4, moe_intermediate_size=128)


def foreign(name: str) -> Scheme:
    """What a library writes, which is what it says that this stands for."""
    import torch
    from foreign_quantisers import WRITERS

    names = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}
    names |= {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    write = WRITERS[name]

    def quantised(weight: np.ndarray) -> Quantised:
        written = write(torch.from_numpy(weight.copy()))
        tensors: dict[str, Any] = {}
        for part, one in written.tensors.items():
            raw = one.detach().contiguous()
            bits = raw.view(torch.int16) if raw.dtype == torch.bfloat16 else raw
            bits = raw.view(torch.uint8) if raw.dtype == torch.float8_e4m3fn else bits
            tensors[part] = names[raw.dtype], bits.numpy()
        return Quantised(tensors, written.expected.numpy())

    return Scheme(write(torch.randn(128, 128)).settings, quantised)


@pytest.mark.parametrize("name", [*SCHEMES, *FOREIGN])
def test_bundle_and_logits(original: Path, tmp_path: Path, name: str, relative_error: RelativeError) -> None:
    if name in FOREIGN and importlib.util.find_spec(FOREIGN[name]) is None:
        pytest.skip(f"{FOREIGN[name]} is not installed")
    scheme = SCHEMES[name] if name in SCHEMES else foreign(name)
    # transformers quantises whole blocks alone.
    which = is_expert if name == "fp8-blocks" else is_projection
    quantised, plain = quantise(original, tmp_path, scheme, which)
    bundle = converted(quantised)
    assert shards(bundle) == shards(converted(plain))
    with Engine.open(bundle, EngineSettings(context=64, threads=1, prefault=False, device="cpu")) as engine:
        logits = engine.prefill(TOKENS, all_logits=True)
    assert relative_error(logits, reference(plain)) <= 2e-2


@pytest.mark.parametrize("name", ["int4", "mxfp4", "ct-int4-g32", "ct-mxfp4", "gptq"])
def test_logits_of_kept_codes(
    original: Path, tmp_path: Path, name: str, relative_error: RelativeError
) -> None:
    """In the formats that are chosen by themselves, on both sides the experts are what the checkpoint has."""
    writer = FOREIGN.get(name, "gptqmodel")
    if name not in ("int4", "mxfp4") and importlib.util.find_spec(writer) is None:
        pytest.skip(f"{writer} is not installed")
    scheme = SCHEMES[name] if name in ("int4", "mxfp4") else foreign(name)
    quantised, plain = quantise(original, tmp_path, scheme)
    bundle = converted(quantised, "--gpu-scales", "f16" if "mxfp4" not in name else "bf16")
    for tier in ("cpu", "gpu"):
        settings = EngineSettings(context=64, threads=1, prefault=False, device="cpu")
        if tier == "gpu":
            settings = replace(settings, experts=tier, activations="float32")
        with Engine.open(bundle, settings) as engine:
            logits = engine.prefill(TOKENS, all_logits=True)
        assert relative_error(logits, reference(plain, f"reference-{tier}")) <= 2e-2


@pytest.mark.parametrize("name", ["fp8", "awq"])
def test_mixed_with_plain_weights(original: Path, tmp_path: Path, name: str) -> None:
    """Attention, one layer's experts and the head plain, as lists of modules leave them out."""

    def which(name: str) -> bool:
        return ".experts." in name and not name.startswith("model.layers.1")

    quantised, plain = quantise(original, tmp_path, SCHEMES[name], which)
    assert shards(converted(quantised)) == shards(converted(plain))


def test_quantised_head_and_embedding(original: Path, tmp_path: Path) -> None:
    def which(name: str) -> bool:
        return name in ("lm_head.weight", "model.embed_tokens.weight")

    quantised, plain = quantise(original, tmp_path, SCHEMES["fp8_channel"], which)
    assert shards(converted(quantised)) == shards(converted(plain))


def is_expert(name: str) -> bool:
    """Whether a weight is an expert's."""
    return ".experts." in name


def converted(folder: Path, *options: str) -> Path:
    """Its bundle. Groups of 64 keep no codes."""
    out = folder.with_suffix(".krasis")
    fixed = ["--quiet", "--force-text", "--threads", "1", *(options or ("--gpu-group", "64"))]
    done = CliRunner().invoke(convert, [str(folder), "-o", str(out), *fixed], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def shards(bundle: Path) -> dict[str, bytes]:
    """Every byte of the weights but the CPU's experts, which may keep more than the plain twin's do."""
    files = [path for path in bundle.glob("*.safetensors") if not path.name.startswith("cpu")]
    assert len(files) == 2
    return {path.name: path.read_bytes() for path in files}


def reference(plain: Path, name: str = "reference") -> np.ndarray:
    """transformers' logits in float32."""
    checkpoint = ShardedCheckpoint.open(plain)
    state = {}
    for name, info in checkpoint.tensors.items():
        values = np.asarray(checkpoint.array(name))
        state[name] = (values.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else values
    config = json.loads((plain / "config.json").read_text("utf-8"))
    return transformers_logits(write_checkpoint(state, config, plain.parent / name), TOKENS)
