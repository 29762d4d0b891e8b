"""gpt-oss as it was released: MXFP4 experts go from the checkpoint, or a GGUF, into the kernels of both sides
bit for bit, and the logits are those of transformers in float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.layouts import CpuTileLayout, MarlinMxfp4Layout
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.weights import load_weights
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_ggufs import CONVERTER, convert_by_llama_cpp, read_tensors, tiny_gguf
from tests.support.tiny_mxfp4 import tiny_mxfp4

TOKENS = np.random.default_rng(8).integers(0, 256, 45).tolist()
RelativeError = Callable[[np.ndarray, np.ndarray], float]
LAYOUT = CpuTileLayout("mxfp4")
LAYOUTS = {"cpu": LAYOUT, "gpu": MarlinMxfp4Layout()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mxfp4(tmp_path_factory.mktemp("mxfp4") / "hf")


def converted(source: Path, out: Path, *options: str) -> Path:
    arguments = [str(source), "-o", str(out), "--quiet", "--force-text", *options]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module", params=["hf", "gguf"])
def bundle(request: pytest.FixtureRequest, folder: Path) -> Path:
    source = folder
    if request.param == "gguf":
        source = tiny_gguf(folder.with_name("hf-bf16"), folder.with_name("m.gguf"), experts="MXFP4")
    return converted(source, folder.with_name(f"{request.param}.krasis"))


@pytest.mark.parametrize("tier", LAYOUTS)
def test_experts_keep_their_bits(bundle: Path, folder: Path, tier: str) -> None:
    plain = read_tensors(folder.with_name("hf-bf16"))
    with Bundle.open(bundle) as opened:
        assert opened.manifest.layouts == {
            "dense": "int8-rows-r32k4",
            "gpu": "marlin-e2m1-g32-e8m0",
            "cpu": "cpu-mxfp4-r32-b32",
        }
        for layer in range(4):
            root = f"model.layers.{layer}.mlp.experts."
            for expert, record in enumerate(opened.map(f"layers.{layer}.experts.{tier}")):
                gate, up, down = LAYOUTS[tier].unpack_expert(record, 192, 64)
                both = plain[f"{root}gate_up_proj"][expert].T
                np.testing.assert_array_equal(gate, both[::2])
                np.testing.assert_array_equal(up, both[1::2])
                np.testing.assert_array_equal(down, plain[f"{root}down_proj"][expert].T)


SETTINGS: list[tuple[dict[str, Any], float]] = [
    ({"device": "cpu"}, 2e-2),
    ({"device": "cpu", "activations": "float32", "kv_dtype": "f32"}, 1e-3),
    ({"device": "gpu", "gpu_dtype": "bf16"}, 1e-2),
    ({"device": "gpu", "gpu_dtype": "f16"}, 5e-3),
]


@pytest.mark.parametrize(("changes", "limit"), SETTINGS)
def test_logits_equal_transformers(
    bundle: Path,
    folder: Path,
    relative_error: RelativeError,
    gpu_kind: str,
    changes: dict[str, Any],
    limit: float,
) -> None:
    if on_gpu := changes["device"] == "gpu":
        # Of a real one's limit what the process already holds is taken off.
        changes = changes | {"device": gpu_kind, "vram_bytes": 2**30 if gpu_kind == "double" else None}
    config = json.loads((folder.with_name("hf-bf16") / "config.json").read_text("utf-8"))
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "cpu"))
    twin = write_checkpoint(state, config, bundle.with_suffix(".twin"))
    expected = transformers_logits(twin, TOKENS)
    settings = EngineSettings(context=64, threads=1, prefault=False, **changes)
    with Engine.open(bundle, settings) as engine:
        whole = engine.prefill(TOKENS, all_logits=True)
        engine.reset()
        parts = [engine.prefill(TOKENS[begin:end], all_logits=True) for begin, end in ((0, 7), (7, 40))]
        parts += [engine.decode(token)[None] for token in TOKENS[40:]]
    assert relative_error(whole, expected) <= limit
    # There, decode has the CPU's experts, whose activations are int8.
    assert relative_error(np.concatenate(parts), expected) <= (2e-2 if on_gpu else limit)
    # The experts were not rounded, so that the model itself is not far, though its attention has 8 bits.
    assert relative_error(whole, transformers_logits(folder.with_name("hf-bf16"), TOKENS)) <= 3e-2


@pytest.mark.parametrize("bundle", ["hf"], indirect=True)
@pytest.mark.parametrize("num_resident", [0, 2])
def test_experts_of_both_sides_share_a_token(
    bundle: Path,
    folder: Path,
    relative_error: RelativeError,
    open_gpu: Callable[..., Any],
    vram_for: Callable[..., int],
    num_resident: int,
) -> None:
    """Streamed in prefill; in decode some on the GPU, others with their biases and activation on the CPU."""
    config = json.loads((folder.with_name("hf-bf16") / "config.json").read_text("utf-8"))
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "gpu"))
    twin = write_checkpoint(state, config, bundle.with_suffix(f".twin{num_resident}"))
    expected = transformers_logits(twin, TOKENS)
    vram_bytes = vram_for(bundle, 64, group_experts=2, resident=num_resident)
    engine = open_gpu(bundle, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
    found = [engine.prefill(TOKENS[:40], all_logits=True), *(engine.decode(t)[None] for t in TOKENS[40:])]
    assert "CPU experts" in engine._backend._parts.decoder.description
    assert relative_error(found[0], expected[:40]) <= 5e-3
    assert relative_error(np.concatenate(found[1:]), expected[40:]) <= 2e-2


def test_other_formats_of_the_cpu_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    eight = converted(folder, tmp_path / "eight.krasis", "--cpu-format", "q8")
    with Bundle.open(eight) as opened:
        assert opened.manifest.layouts["cpu"] == "cpu-q8-r32-b32"


def test_a_copy_in_floats_becomes_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    """As the hub has BF16 copies; ``--cpu-format mxfp4`` finds the codes again."""
    copy = converted(folder.with_name("hf-bf16"), tmp_path / "copy.krasis", "--cpu-format", "mxfp4")
    native = converted(folder, tmp_path / "native.krasis")
    with Bundle.open(copy) as ours, Bundle.open(native) as theirs:
        for one, other in zip(
            ours.map("layers.2.experts.cpu"), theirs.map("layers.2.experts.cpu"), strict=True
        ):
            for mine, yours in zip(
                LAYOUT.unpack_expert(one, 192, 64), LAYOUT.unpack_expert(other, 192, 64), strict=True
            ):
                np.testing.assert_array_equal(mine, yours)


def test_other_formats_of_the_gpu_are_told_to_round_again(folder: Path, tmp_path: Path) -> None:
    arguments = [
        str(folder),
        "-o",
        str(tmp_path / "x.krasis"),
        "--force-text",
        "--gpu-group",
        "64",
        "--dry-run",
    ]
    done = CliRunner().invoke(convert, arguments)
    assert done.exit_code == 0, done.output
    assert "rounded a second time" in " ".join(done.output.split())
    assert "marlin-u4b8-g64-bf16" in done.output
    done = CliRunner().invoke(convert, [*arguments, "--gpu-format", "mxfp4"])
    assert done.exit_code == 2
    assert "--gpu-format mxfp4 has 4 bits and scales of its own for each 32" in done.output


@pytest.mark.skipif(CONVERTER not in os.environ, reason=f"{CONVERTER} does not name llama.cpp's sources")
def test_llama_cpp_s_own_gguf_gives_the_same_records(folder: Path, tmp_path: Path) -> None:
    theirs = convert_by_llama_cpp(folder, tmp_path / "theirs.gguf")
    ours = converted(folder, tmp_path / "hf.krasis")
    from_gguf = converted(theirs, tmp_path / "gguf.krasis")
    with Bundle.open(ours) as first, Bundle.open(from_gguf) as second:
        for layer in range(4):
            name = f"layers.{layer}.experts.cpu"
            np.testing.assert_array_equal(first.map(name), second.map(name))
            for part in ("gate", "up", "down"):
                bias = f"layers.{layer}.experts.{part}.bias"
                np.testing.assert_array_equal(first.map(bias), second.map(bias))
            for sinks in (f"layers.{layer}.attention.sinks", f"layers.{layer}.experts.router.bias"):
                np.testing.assert_array_equal(first.map(sinks), second.map(sinks))
        assert first.manifest.spec.layers == second.manifest.spec.layers
