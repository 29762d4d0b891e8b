"""Qwen3-Next and Qwen3.5: their fused and tiled projections, from checkpoints and GGUFs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_runs import tree_digests
from safetensors.torch import load_file, save_file
from tiny_checkpoints import DELTA, reference_model, tiny
from tiny_ggufs import convert_by_llama_cpp, llama_cpp, read_tensors, tiny_gguf

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.layouts import Int8RowsLayout, bf16_to_float32
from krasis.formats.models.spec import ModelSpec

FAMILIES = ("qwen3_next", "qwen3_5_moe")
SETTINGS: dict[str, Any] = {"tiers": ("cpu",)}
KEYS, HEADS, KEY_DIM, DIM = (
    DELTA[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
)
SHARE, ATTENTION_LAYER, HEAD_DIM = HEADS // KEYS, 3, 32


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(family, tmp_path_factory.mktemp(family) / "hf")


@pytest.fixture(scope="module")
def converted(checkpoint: Path, run: Callable[..., Any]) -> Path:
    return run([checkpoint], checkpoint.parent / "hf.krasis", **SETTINGS).path


def values_of(bundle: Bundle, name: str) -> np.ndarray:
    """A blob's values in float32; of codes with their scales."""
    blob, data = bundle.blob(name), bundle.map(name)
    if blob.layout != "plain":
        return Int8RowsLayout().unpack(data, bundle.map(f"{name}.scale"))
    return bf16_to_float32(data) if blob.dtype == "BF16" else data.astype(np.float32)


def delta_of(family: str, tensors: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """A linear layer's blobs by hand, head by head."""
    root = f"model.layers.{layer}.linear_attn."

    def part(name: str) -> np.ndarray:
        return tensors[f"{root}{name}"]

    if family == "qwen3_next":
        step = 2 * KEY_DIM + 2 * SHARE * DIM
        groups = [part("in_proj_qkvz.weight")[i * step :][:step] for i in range(KEYS)]
        middle = 2 * KEY_DIM + SHARE * DIM
        bounds = [(0, KEY_DIM), (KEY_DIM, 2 * KEY_DIM), (2 * KEY_DIM, middle), (middle, step)]
        qkvz = [group[begin:end] for begin, end in bounds for group in groups]
        both = [part("in_proj_ba.weight")[i * 2 * SHARE :][: 2 * SHARE] for i in range(KEYS)]
        ba = [one[:SHARE] for one in both] + [one[SHARE:] for one in both]
    else:
        qkvz = [part("in_proj_qkv.weight"), part("in_proj_z.weight")]
        ba = [part("in_proj_b.weight"), part("in_proj_a.weight")]
    return {
        "delta.qkvz": np.concatenate(qkvz),
        "delta.output": part("out_proj.weight"),
        "delta.ba": np.concatenate(ba),
        "delta.conv": part("conv1d.weight")[:, 0],
        "delta.a_log": part("A_log"),
        "delta.dt_bias": part("dt_bias"),
        "delta.gate_norm": part("norm.weight"),
        "attention.norm": 1 + tensors[f"model.layers.{layer}.input_layernorm.weight"],
        "experts.norm": 1 + tensors[f"model.layers.{layer}.post_attention_layernorm.weight"],
    }


def attention_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The attention layer's blobs by hand."""
    root = f"model.layers.{ATTENTION_LAYER}.self_attn."
    q = tensors[f"{root}q_proj.weight"]
    heads = [q[at : at + HEAD_DIM] for at in range(0, len(q), HEAD_DIM)]
    kv = [tensors[f"{root}{part}_proj.weight"] for part in "kv"]
    return {
        "attention.qkv": np.concatenate([*heads[::2], *kv]),
        "attention.gate": np.concatenate(heads[1::2]),
        "attention.output": tensors[f"{root}o_proj.weight"],
        "attention.q_norm": 1 + tensors[f"{root}q_norm.weight"],
        "attention.k_norm": 1 + tensors[f"{root}k_norm.weight"],
    }


def test_every_weight_is_the_checkpoints(family: str, checkpoint: Path, converted: Path) -> None:
    tensors = read_tensors(checkpoint)
    expected = {"final_norm": 1 + tensors["model.norm.weight"]}
    for layer in range(3):
        found = delta_of(family, tensors, layer)
        expected |= {f"layers.{layer}.{name}": values for name, values in found.items()}
    expected |= {f"layers.{ATTENTION_LAYER}.{name}": one for name, one in attention_of(tensors).items()}
    with Bundle.open(converted) as bundle:
        for name, values in expected.items():
            found = values_of(bundle, name)
            if bundle.blob(name).layout == "plain":
                np.testing.assert_array_equal(found, values, err_msg=name)
            else:
                assert not found[len(values) :].any(), name
                error = np.square(found[: len(values)] - values).sum()
                assert error <= 1e-4 * np.square(values).sum(), name
        for name in ("delta.conv", "delta.a_log", "delta.dt_bias"):
            assert bundle.blob(f"layers.0.{name}").dtype == "F32"


def check_same_spec(ours: ModelSpec, theirs: ModelSpec) -> None:
    """But for the eps, which a GGUF has in float32."""
    assert theirs.norm.eps == pytest.approx(ours.norm.eps)
    assert replace(theirs, norm=ours.norm) == ours


@pytest.mark.parametrize("dense", ["F32", "Q8_0"])
def test_a_gguf_gives_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path, dense: str
) -> None:
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf", dense=dense)
    other = run([path], tmp_path / "gguf.krasis", **SETTINGS)
    with Bundle.open(converted) as ours, Bundle.open(other.path) as theirs:
        check_same_spec(ours.spec, theirs.spec)
        for blob in ours.manifest.blobs:
            if blob.tier != "dense":
                assert np.array_equal(ours.map(blob.name), theirs.map(blob.name)), blob.name
            elif not blob.name.endswith(".scale"):
                expected, found = values_of(ours, blob.name), values_of(theirs, blob.name)
                is_exact = dense == "F32" or len(blob.shape) == 1 or blob.name.endswith("delta.conv")
                limit = (1e-12 if "a_log" in blob.name else 0) if is_exact else 1e-3
                assert np.square(found - expected).sum() <= limit * np.square(expected).sum(), blob.name


def test_both_are_told_to_be_the_same_model(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf", experts="Q8_0", dense="Q8_0")
    bundle = run([checkpoint, path], tmp_path / "out.krasis", **SETTINGS)
    assert bundle.summary.quality["experts.cpu.w13"]["relative_mse"] == 0.0


def test_heads_in_another_order_are_another_model(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("qwen3_5_moe", tmp_path / "hf")
    path = tiny_gguf(source, tmp_path / "tiny.gguf")
    monkeypatch.setattr("krasis.formats.models.picks._tiled", lambda mixer, width: np.arange(HEADS * width))
    with pytest.raises(MismatchError, match="another model"):
        run([source, path], tmp_path / "out.krasis", **SETTINGS)


def test_llama_cpp_writes_the_same_gguf(family: str, checkpoint: Path, tmp_path: Path) -> None:
    if llama_cpp() is None:
        pytest.skip("KRASIS_LLAMA_CPP does not name the folder of llama.cpp's sources")
    ours = gguf.GGUFReader(tiny_gguf(checkpoint, tmp_path / "ours.gguf"))
    theirs = gguf.GGUFReader(convert_by_llama_cpp(checkpoint, tmp_path / "theirs.gguf", "f32", "--no-mtp"))
    tensors = {one.name: one for one in theirs.tensors}
    assert {one.name for one in ours.tensors} == tensors.keys()
    for one in ours.tensors:
        if one.name.endswith("ssm_a"):  # exponentials of two libraries
            np.testing.assert_allclose(one.data, tensors[one.name].data, rtol=1e-6)
        else:
            assert np.array_equal(one.data, tensors[one.name].data), one.name
    for key, field in ours.fields.items():
        if not key.startswith(("GGUF.", "general.")) and not key.endswith("vocab_size"):
            assert theirs.fields[key].contents() == field.contents(), key


def test_experts_in_one_below_a_vision_tower_give_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    """As the hub has Qwen3.5: nested, with a tower and a layer that only drafts, which are left out."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if config["model_type"] == "qwen3_next":
        pytest.skip("the hub has no such checkpoints of it")
    state = {name: one.bfloat16() for name, one in reference_model("qwen3_5_moe").state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    nested = {name.replace("model.", "model.language_model.", 1): one for name, one in state.items()}
    nested |= {"model.visual.patch_embed.proj.weight": nested["lm_head.weight"][:4].clone()}
    nested |= {"mtp.fc.weight": nested["lm_head.weight"][:4].clone()}
    (tmp_path / "hf").mkdir()
    save_file(nested, tmp_path / "hf" / "model.safetensors")
    whole = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": config | {"mtp_num_hidden_layers": 1},
        "vision_config": {},
        "tie_word_embeddings": False,
    }
    (tmp_path / "hf" / "config.json").write_text(json.dumps(whole))
    bundle = run([tmp_path / "hf"], tmp_path / "out.krasis", **SETTINGS)
    assert "only draft" in bundle.messages
    assert "vision tower" in bundle.messages
    shards = {name: digest for name, digest in bundle.files().items() if name.endswith("safetensors")}
    assert shards.items() <= tree_digests(converted).items()


def test_a_decay_rate_that_is_none_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    source = tiny("qwen3_5_moe", tmp_path / "hf")
    path = tiny_gguf(source, tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.0.ssm_a")
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32(0.5).tobytes()
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"ssm_a.*decay rates are negative .got 0\.5"):
        run([path], tmp_path / "out.krasis", **SETTINGS)


def test_a_projection_of_another_shape_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    source = tiny("qwen3_next", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"in_proj_qkvz.*wrong shape .*255.*256"):
        run([source], tmp_path / "out.krasis", **SETTINGS)
