"""GLM-5.3-Flash: a checkpoint beside a vision tower, one without, and a GGUF are the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny
from tiny_ggufs import convert_by_llama_cpp, llama_cpp, tiny_gguf

from krasis.formats.bundle.reader import Bundle
from krasis.formats.layouts import Int8RowsLayout, bf16_to_float32

SETTINGS: dict[str, Any] = {"tiers": ("cpu",)}
# What the hub's config has beside what transformers writes.
OF_THE_HUB = {
    "first_k_dense_replace": 1,
    "mla_use_nope": True,
    "mhc": True,
    "scoring_func": "sigmoid",
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 64,
        "short_conv_kernel_size": 4,
        "gate_lower_bound": -5.0,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny("glm5_next", tmp_path_factory.mktemp("glm5") / "hf")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["text_config"] |= OF_THE_HUB
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint: Path, run: Callable[..., Any]) -> Path:
    return run([checkpoint], checkpoint.parent / "hf.krasis", **SETTINGS).path


def values_of(bundle: Bundle, name: str) -> np.ndarray:
    """A blob's values in float32; of codes with their scales."""
    blob, data = bundle.blob(name), bundle.map(name)
    if blob.layout == "int8_rows-r32k4":
        return Int8RowsLayout().unpack(data, bundle.map(f"{name}.scale"))
    return bf16_to_float32(data) if blob.dtype == "BF16" else data.astype(np.float32)


def copied(checkpoint: Path, folder: Path, *, has_tower: bool) -> dict[str, Any]:
    """A copy of the checkpoint, with its tower or as a language model alone. Returns its config."""
    folder.mkdir()
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text("utf-8"))
    tensors = load_file(checkpoint / "model.safetensors")
    if not has_tower:
        own = {"architectures": ["Glm5NextForCausalLM"], "tie_word_embeddings": False}
        config = config["text_config"] | {"model_type": "glm5_next_text"} | own
        tensors = {
            name.replace("language_model.", ""): one for name, one in tensors.items() if "visual" not in name
        }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return config


def rounded(value: Any) -> Any:
    """Fields with their numbers as a GGUF's float32 has them."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def test_the_tower_is_left_out_with_a_note(checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    bundle = run([checkpoint], tmp_path / "a.krasis", **SETTINGS)
    assert "tensors of the vision tower are left out" in bundle.messages


def test_streams_and_pools_keep_their_numbers(checkpoint: Path, converted: Path) -> None:
    """By hand from the hub's names: nothing of them is packed."""
    tensors = load_file(checkpoint / "model.safetensors")
    root = "model.language_model.layers."
    pairs = {f"0.attention.residual.{one}": f"0.hc_attn_{one}" for one in ("fn", "base", "scale")}
    pairs |= {f"4.mlp.residual.{one}": f"4.hc_ffn_{one}" for one in ("fn", "base", "scale")}
    indexer = "1.self_attn.indexer.index_kpool_compress_"
    pairs |= {"1.index.pool_gate": f"{indexer}gate", "1.index.pool_position": f"{indexer}ape"}
    with Bundle.open(converted) as bundle:
        for ours, theirs in pairs.items():
            expected = tensors[f"{root}{theirs}"].float().numpy()
            np.testing.assert_array_equal(values_of(bundle, f"layers.{ours}"), expected)
        names = {blob.name for blob in bundle.manifest.blobs}
    assert "layers.1.index.k" in names
    assert "layers.2.index.k" not in names  # which takes the choice of the layer before


def test_a_language_model_alone_is_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    copied(checkpoint, folder, has_tower=False)
    other = run([folder], tmp_path / "a.krasis", **SETTINGS)
    with Bundle.open(converted) as one, Bundle.open(other.path) as two:
        assert two.spec == one.spec
        for blob in one.manifest.blobs:
            np.testing.assert_array_equal(two.map(blob.name), one.map(blob.name), blob.name)


def test_a_gguf_is_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf")
    other = run([path], tmp_path / "gguf.krasis", **SETTINGS)
    with Bundle.open(converted) as one, Bundle.open(other.path) as two:
        assert rounded(asdict(two.spec)) == rounded(asdict(one.spec))
        for blob in one.manifest.blobs:
            if blob.tier == "dense" and not blob.name.endswith(".scale"):
                values = values_of(two, blob.name), values_of(one, blob.name)
                np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-7, err_msg=blob.name)
    small = tiny_gguf(checkpoint, tmp_path / "q8.gguf", experts="Q8_0", dense="Q8_0")
    both = run([checkpoint, small], tmp_path / "both.krasis", **SETTINGS)  # told to be the same model
    assert both.summary.quality["experts.cpu.w13"]["relative_mse"] == 0.0


@pytest.mark.parametrize("has_tower", [True, False])
def test_the_layer_that_drafts_is_left_out(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path, has_tower: bool
) -> None:
    folder = tmp_path / "hf"
    config = copied(checkpoint, folder, has_tower=has_tower)
    table = config["text_config"] if has_tower else config
    table["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    root = "model.language_model." if has_tower else "model."
    like = tensors[f"{root}norm.weight"]
    tensors |= {f"{root}layers.5.{name}.weight": like.clone() for name in ("enorm", "input_layernorm")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    bundle = run([folder], tmp_path / "a.krasis", **SETTINGS)
    assert "2 tensors of layers that only draft (multi-token prediction) are left out" in bundle.messages
    with Bundle.open(bundle.path) as opened:
        assert (len(opened.spec.layers), opened.spec.draft_layers) == (5, 1)


def test_llama_cpp_writes_the_same_gguf(checkpoint: Path, tmp_path: Path) -> None:
    """What these tests write is what llama.cpp's converter makes of the checkpoint."""
    if llama_cpp() is None:
        pytest.skip("KRASIS_LLAMA_CPP does not name the folder of llama.cpp's sources")
    ours = gguf.GGUFReader(tiny_gguf(checkpoint, tmp_path / "ours.gguf"))
    theirs = gguf.GGUFReader(convert_by_llama_cpp(checkpoint, tmp_path / "theirs.gguf"))
    tensors = {one.name: one for one in theirs.tensors}
    assert {one.name for one in ours.tensors} == tensors.keys()
    for one in ours.tensors:  # exponentials of NumPy and torch differ in the last bit
        tolerance = 1e-6 if one.name.endswith("ssm_a") else 0
        np.testing.assert_allclose(one.data, tensors[one.name].data, rtol=tolerance, err_msg=one.name)
    for key, field in ours.fields.items():
        if not key.startswith(("GGUF.", "general.")) and not key.endswith("rope.freq_base"):
            assert theirs.fields[key].contents() == field.contents(), key
