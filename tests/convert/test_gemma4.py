"""Gemma 4's tensors, alone and within a model of pictures and text, in a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_model import write_safetensors
from tiny_checkpoints import tiny
from tiny_ggufs import read_tensors, tiny_gguf

from krasis.formats.bundle.reader import Bundle
from krasis.formats.layouts import Int8RowsLayout, bf16_to_float32, layout_from_id

PLAIN = {
    "attention.norm": "input_layernorm.weight",
    "attention.post_norm": "post_attention_layernorm.weight",
    "attention.q_norm": "self_attn.q_norm.weight",
    "mlp.norm": "pre_feedforward_layernorm.weight",
    "mlp.own_post_norm": "post_feedforward_layernorm_1.weight",
    "mlp.post_norm": "post_feedforward_layernorm.weight",
    "experts.norm": "pre_feedforward_layernorm_2.weight",
    "experts.post_norm": "post_feedforward_layernorm_2.weight",
    "experts.router": "router.proj.weight",
    "experts.router.scale": "router.scale",
    "experts.router.expert_scale": "router.per_expert_scale",
    "output_scale": "layer_scalar",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("gemma4", tmp_path_factory.mktemp("gemma4") / "hf")


def test_every_weight_is_the_checkpoints(checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    tensors = read_tensors(checkpoint)
    with Bundle.open(run([checkpoint], tmp_path / "a.krasis", tiers=("cpu",)).path) as bundle:
        for layer in range(3):
            root = f"model.layers.{layer}."
            for ours, theirs in PLAIN.items():
                blob, data = bundle.blob(f"layers.{layer}.{ours}"), bundle.map(f"layers.{layer}.{ours}")
                found = bf16_to_float32(data) if blob.dtype == "BF16" else data
                np.testing.assert_array_equal(found, tensors[root + theirs], ours)
            parts = "qkv" if layer != 2 else "qk"  # full layers have no values
            expected = np.concatenate([tensors[f"{root}self_attn.{part}_proj.weight"] for part in parts])
            name = f"layers.{layer}.attention.qkv"
            found = Int8RowsLayout().unpack(bundle.map(name), bundle.map(f"{name}.scale"))
            assert found.shape == expected.shape
            assert np.square(found - expected).sum() <= 1e-4 * np.square(expected).sum()
            blob = bundle.blob(f"layers.{layer}.experts.cpu")
            record = bundle.map(blob.name)[5]
            unpacked = layout_from_id(blob.layout).unpack_expert(record, 128, 64)
            both = tensors[f"{root}experts.gate_up_proj"][5]
            for part, values in zip(
                unpacked, (*np.split(both, 2), tensors[f"{root}experts.down_proj"][5]), strict=True
            ):
                assert np.square(part - values).sum() <= 1e-4 * np.square(values).sum()


def test_a_gguf_gives_the_same(checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    """llama.cpp keeps which pairs turn in a tensor, and which layers have values in no word of its own."""
    hf = run([checkpoint], tmp_path / "hf.krasis", tiers=("cpu",))
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf")
    with (
        Bundle.open(hf.path) as ours,
        Bundle.open(run([path], tmp_path / "g.krasis", tiers=("cpu",)).path) as theirs,
    ):
        assert theirs.spec.norm.eps == pytest.approx(ours.spec.norm.eps)  # float32 there
        assert replace(theirs.spec, norm=ours.spec.norm) == ours.spec
        for blob in ours.manifest.blobs:
            found, expected = theirs.map(blob.name), ours.map(blob.name)
            if blob.dtype == "BF16":
                expected = bf16_to_float32(expected)
            np.testing.assert_array_equal(found, expected, blob.name)


def test_towers_are_left_out(checkpoint: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    """Within a model of pictures, text and sound the same bytes come of it, with a note."""
    plain = run([checkpoint], tmp_path / "plain.krasis", tiers=("cpu",))
    tensors = {
        name.replace("model.", "model.language_model."): ("F32", data)
        for name, data in read_tensors(checkpoint).items()
    }
    tensors |= {
        f"model.{name}.weight": ("F32", np.ones((4, 4), np.float32))
        for name in (
            "vision_tower.patch",
            "embed_vision.projection",
            "audio_tower.conv",
            "embed_audio.projection",
        )
    }
    (tmp_path / "hf").mkdir()
    write_safetensors(tmp_path / "hf" / "model.safetensors", tensors)
    config = (checkpoint / "config.json").read_text("utf-8")
    outer = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(outer | {"text_config": json.loads(config)}))
    bundle = run([tmp_path / "hf"], tmp_path / "out.krasis", tiers=("cpu",))
    assert "2 tensors of the vision tower" in bundle.messages
    assert "audio tower" in bundle.messages
    with Bundle.open(bundle.path) as ours, Bundle.open(plain.path) as theirs:
        assert ours.spec == theirs.spec
        for name in ("layers.1.experts.cpu", "layers.2.attention.qkv"):
            np.testing.assert_array_equal(ours.map(name), theirs.map(name))
