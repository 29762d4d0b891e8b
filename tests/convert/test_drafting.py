"""Layers for multi-token prediction, from checkpoints and GGUFs: taken by ``--mtp``, left out without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError, UsageError
from krasis.formats.layouts import Int8RowsLayout, expert_format
from krasis.formats.models.spec import ModelSpec
from tests.support.tiny_checkpoints import tiny
from tests.support.tiny_drafting import as_in_a_gguf, tiny_drafting
from tests.support.tiny_ggufs import convert_by_llama_cpp, llama_cpp, read_tensors, tiny_gguf

FAMILIES = ("qwen3_next", "qwen3_5_moe", "glm4_moe", "deepseek_v3")
TWO = ("qwen3_5_moe", "glm4_moe")  # names of a root of their own, and those of the next layer
SETTINGS: dict[str, Any] = {"tiers": ("cpu",)}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_drafting(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, run: Callable[..., Any]) -> Path:
    return run([checkpoint], checkpoint.parent / "mtp.krasis", mtp=True, **SETTINGS).path


def blobs_of(path: Path) -> dict[str, bytes]:
    with Bundle.open(path) as opened:
        return {blob.name: opened.map(blob.name).tobytes() for blob in opened.manifest.blobs}


def draft_blobs(path: Path) -> dict[str, bytes]:
    with Bundle.open(path) as opened:
        root = f"layers.{len(opened.spec.layers)}."
    found = {name: data for name, data in blobs_of(path).items() if name.startswith(root)}
    assert len(found) > 10
    return found


def test_the_layer_is_taken_by_its_own_names(checkpoint: Path, bundle: Path) -> None:
    tensors = read_tensors(checkpoint)
    with Bundle.open(bundle) as opened:
        whole, spec = opened.manifest.spec, opened.spec
        last, manifest = len(spec.layers), opened.manifest
        assert whole.layers[:-1] == spec.layers
        assert whole.layers[-1].drafts
        assert not any(layer.drafts for layer in spec.layers)
        root = "mtp." if "mtp.fc.weight" in tensors else f"model.layers.{last}."
        is_mtp = root == "mtp."
        names = {"draft.projection": "fc" if is_mtp else "eh_proj"}
        names |= {"draft.embedding_norm": "pre_fc_norm_embedding" if is_mtp else "enorm"}
        names |= {"draft.hidden_norm": "pre_fc_norm_hidden" if is_mtp else "hnorm"}
        names |= {"draft.norm": "norm" if is_mtp else "shared_head.norm"}
        for ours, theirs in names.items():
            blob = f"layers.{last}.{ours}"
            expected, data = tensors[f"{root}{theirs}.weight"], opened.map(blob)
            if data.dtype == np.int8:
                data = Int8RowsLayout().unpack(data, opened.map(f"{blob}.scale"))[: len(expected)]
                np.testing.assert_allclose(data, expected, atol=np.abs(expected).max() / 127)
            else:
                np.testing.assert_array_equal(data, expected + is_mtp)
        layer_root = "mtp.layers.0." if is_mtp else root
        record = opened.map(f"layers.{last}.experts.cpu")[3]
        packed = expert_format(manifest.layouts["cpu"])
        gate = packed.unpack_expert(record, spec.hidden, 64)[0]
        expected = tensors[f"{layer_root}mlp.experts.3.gate_proj.weight"]
        np.testing.assert_allclose(gate, expected, atol=np.abs(expected).max() / 100)


@pytest.mark.parametrize("checkpoint", TWO, indirect=True, scope="module")
def test_without_the_option_it_is_left_out_and_told(
    checkpoint: Path, bundle: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    plain = run([checkpoint], tmp_path / "plain.krasis", **SETTINGS)
    assert "only draft (multi-token prediction) are left out" in plain.messages
    assert "--mtp takes such a layer" in plain.messages
    with Bundle.open(plain.path) as opened, Bundle.open(bundle) as with_draft:
        assert opened.spec == opened.manifest.spec == with_draft.spec
        assert "mtp" not in opened.manifest.recipe
        assert with_draft.manifest.recipe["mtp"] is True
    found = blobs_of(bundle)
    assert blobs_of(plain.path).items() <= found.items()
    assert {name.split(".")[1] for name in found.keys() - blobs_of(plain.path).keys()} == {
        str(len(with_draft.spec.layers))
    }


@pytest.mark.parametrize("checkpoint", TWO, indirect=True, scope="module")
def test_a_gguf_gives_the_same_layer(
    checkpoint: Path, bundle: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    source = as_in_a_gguf(checkpoint, tmp_path / "renamed")
    gguf = tiny_gguf(source, tmp_path / "tiny.gguf", experts="F32", dense="F32")
    found = run([gguf], tmp_path / "gguf.krasis", mtp=True, **SETTINGS).path
    assert draft_blobs(found) == draft_blobs(bundle)
    both = run([checkpoint, gguf], tmp_path / "both.krasis", mtp=True, **SETTINGS)
    assert draft_blobs(both.path) == draft_blobs(bundle)


def test_llama_cpp_writes_the_same_layer(
    checkpoint: Path, bundle: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    if llama_cpp() is None:
        pytest.skip("KRASIS_LLAMA_CPP does not name the folder of llama.cpp's sources")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if "kv_lora_rank" in config:
        pytest.skip("llama.cpp leaves DeepSeek's out")
    source = tmp_path / "hf"
    source.mkdir()
    for path in checkpoint.iterdir():
        (source / path.name).symlink_to(path)
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    gguf = convert_by_llama_cpp(source, tmp_path / "theirs.gguf")
    found = run([gguf], tmp_path / "gguf.krasis", mtp=True, force_text=True, **SETTINGS).path
    assert draft_blobs(found) == draft_blobs(bundle)


def test_a_source_without_the_layer_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    source = tiny("glm4_moe", tmp_path / "hf")
    with pytest.raises(UsageError, match=r"no layer that drafts .*'model.layers.3.eh_proj.weight'"):
        run([source], tmp_path / "out.krasis", mtp=True)
    gguf = tiny_gguf(source, tmp_path / "tiny.gguf")
    with pytest.raises(UsageError, match=r"no layer that drafts .*'blk.3.nextn.eh_proj.weight'"):
        run([gguf], tmp_path / "out.krasis", mtp=True)
    other = tiny("olmoe", tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"of this family is not read .*olmoe.*glm4_moe"):
        run([other], tmp_path / "out.krasis", mtp=True)


def test_a_layer_that_lacks_a_tensor_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = tiny_drafting("qwen3_5_moe", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KrasisError, match=r"'mtp.layers.0.self_attn.k_proj.weight' is missing"):
        run([source], tmp_path / "out.krasis", mtp=True)


def test_a_calibration_knows_nothing_of_the_layer(run: Callable[..., Any], tmp_path: Path) -> None:
    """It is made with the model alone."""
    source, path, settings = tiny_drafting("glm4_moe", tmp_path / "hf"), tmp_path / "c.h5", {"mtp": True}
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for layer in (1, 2):
            file[f"layers/{layer}/hidden"] = random.random((8, 128)).astype(np.float32)
            file[f"layers/{layer}/intermediate"] = random.random((8, 64)).astype(np.float32)
    plain = run([source], tmp_path / "a.krasis", tiers=("gpu",), **settings).path
    weighted = run([source], tmp_path / "b.krasis", tiers=("gpu",), calibration=path, **settings).path
    assert draft_blobs(weighted) == draft_blobs(plain)
    assert blobs_of(weighted) != blobs_of(plain)


@pytest.mark.parametrize("checkpoint", TWO[1:], indirect=True, scope="module")
def test_a_layer_that_drafts_stands_last_and_not_alone(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        spec = opened.manifest.spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    last = spec.layers[-1]
    for layers in ((last,), (last, *spec.layers), (*spec.layers, last), (*spec.layers, spec.layers[0])):
        with pytest.raises(FormatError, match="only a last layer behind others can draft"):
            replace(spec, layers=layers)
