"""Bundles of every convertible family hold what transformers' class of it computes with, from either kind of
checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import h5py
import numpy as np
import pytest
from convert_model import write_safetensors
from convert_runs import tree_digests
from tiny_checkpoints import reference_model, tiny, turn_experts
from tiny_ggufs import convert_by_llama_cpp, llama_cpp, read_tensors, tiny_gguf

from krasis.convert.conversion import convert, dry_run, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.bundle.blob_names import check_blob_names
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError, ResourceError, UnsupportedModelError
from krasis.formats.files.file_ops import FileOps
from krasis.formats.layouts import Int8RowsLayout, bf16_to_float32, layout_from_id

FAMILIES = (
    "mixtral",
    "olmoe",
    "glm4_moe",
    "qwen2_moe",
    "qwen3_moe",
    "dots1",
    "ernie4_5_moe",
    "hy_v3",
    "minimax_m2",
    "qwen3_vl_moe",
    "granitemoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "mistral4",
)
LATENT = FAMILIES[-4:]
SETTINGS: dict[str, Any] = {"gpu_group": 64}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def converted(checkpoint: Path, run: Callable[..., Any]) -> Path:
    return run([checkpoint], checkpoint.parent / "hf.krasis", **SETTINGS).path


# What the hub calls them where it is not what most families say, below model.layers.N.mlp.
ROOTS = {"qwen3_vl_moe": "model.language_model."}
BLOCKS = {"mixtral": "block_sparse_moe", "minimax_m2": "block_sparse_moe", "granitemoe": "block_sparse_moe"}
ROUTERS = {"hy_v3": "router.gate", "granitemoe": "router.layer"}
SHARED = {
    "glm4_moe": "shared_experts",
    "qwen2_moe": "shared_expert",
    "dots1": "shared_experts",
    "ernie4_5_moe": "shared_experts",
    "hy_v3": "shared_mlp",
    **dict.fromkeys(LATENT, "shared_experts"),
}
CORRECTIONS = {
    "glm4_moe": "gate.e_score_correction_bias",
    "dots1": "gate.e_score_correction_bias",
    "ernie4_5_moe": "moe_statics.e_score_correction_bias",
    "hy_v3": "expert_bias",
    "minimax_m2": "e_score_correction_bias",
    "deepseek_v3": "gate.e_score_correction_bias",
    "glm4_moe_lite": "gate.e_score_correction_bias",
}
FIRST_DENSE = {"glm4_moe", "dots1", "ernie4_5_moe", "hy_v3", *LATENT} - {"mistral4"}


def dense_of(family: str, layer: int, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's dense blobs, spelled out by hand from the hub's names. Codes and scales are one here."""
    i = layer
    root = f"{ROOTS.get(family, 'model.')}layers.{i}."
    attention, block = (f"{root}{part}." for part in ("self_attn", BLOCKS.get(family, "mlp")))
    if family in LATENT:
        return latent_of(family, attention, tensors) | blocks_of(family, i, root, block, tensors)
    found = {
        "attention.qkv": np.concatenate([tensors[f"{attention}{part}_proj.weight"] for part in "qkv"]),
        "attention.output": tensors[f"{attention}o_proj.weight"],
        "attention.norm": tensors[f"{root}input_layernorm.weight"],
    }
    if family not in ("mixtral", "qwen2_moe", "ernie4_5_moe", "granitemoe"):
        found |= {f"attention.{x}_norm": tensors[f"{attention}{x}_norm.weight"] for x in "qk"}
    if family in ("glm4_moe", "qwen2_moe"):
        biases = [tensors[f"{attention}{part}_proj.bias"] for part in "qkv"]
        found["attention.qkv.bias"] = np.concatenate(biases)
    return found | blocks_of(family, i, root, block, tensors)


def latent_of(family: str, attention: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of latent attention: 4 heads of 64 channels without rotation, and of values, latents of 128."""
    names = {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "output": "o_proj"}
    own = {"q": "q_proj"}
    if family != "deepseek_v2":
        own = {"q_a": "q_a_proj", "q_b": "q_b_proj", "q_a_norm": "q_a_layernorm"}
    found = {
        f"attention.{ours}": tensors[f"{attention}{name}.weight"] for ours, name in (names | own).items()
    }
    both = tensors[f"{attention}kv_b_proj.weight"]
    heads = np.split(both, 4)
    found["attention.k_b"] = np.concatenate([head[:64].T for head in heads])
    found["attention.v_b"] = np.concatenate([head[64:] for head in heads])
    assert found["attention.k_b"].shape == (4 * 128, 64)
    assert found["attention.v_b"].shape == (len(both) - 4 * 64, 128)
    found["attention.norm"] = tensors[f"{attention.removesuffix('self_attn.')}input_layernorm.weight"]
    return found


def blocks_of(
    family: str, i: int, root: str, block: str, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What follows attention."""
    found: dict[str, np.ndarray] = {}
    norm = tensors[f"{root}post_attention_layernorm.weight"]
    if family in FIRST_DENSE and i == 0:
        both = [tensors[f"{block}{part}_proj.weight"] for part in ("gate", "up")]
        return found | {
            "mlp.norm": norm,
            "mlp.w13": np.concatenate(both),
            "mlp.w2": tensors[f"{block}down_proj.weight"],
        }
    router = tensors[f"{block}{ROUTERS.get(family, 'gate')}.weight"]
    found |= {"experts.norm": norm, "experts.router": router}
    if family in CORRECTIONS:
        found["experts.router.correction_bias"] = tensors[f"{block}{CORRECTIONS[family]}"].reshape(-1)
    if family in SHARED:
        names = [f"{block}{SHARED[family]}.{part}_proj.weight" for part in ("gate", "up", "down")]
        found["shared.w13"] = np.concatenate([tensors[name] for name in names[:2]])
        found["shared.w2"] = tensors[names[2]]
    if family == "qwen2_moe":
        found["shared.gate"] = tensors[f"{block}shared_expert_gate.weight"]
    return found


def expert_of(family: str, layer: int, expert: int, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """gate, up and down."""
    if family == "qwen3_vl_moe":
        root = f"model.language_model.layers.{layer}.mlp.experts."
        both = tensors[f"{root}gate_up_proj"][expert].T
        return [*np.split(both, 2), tensors[f"{root}down_proj"][expert].T]
    if family == "mistral4":
        root = f"model.layers.{layer}.mlp.experts."
        return [*np.split(tensors[f"{root}gate_up_proj"][expert], 2), tensors[f"{root}down_proj"][expert]]
    if family == "granitemoe":
        root = f"model.layers.{layer}.block_sparse_moe."
        both = tensors[f"{root}input_linear.weight"][expert]
        return [*np.split(both, 2), tensors[f"{root}output_linear.weight"][expert]]
    if family in BLOCKS:
        root = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        return [tensors[f"{root}{part}.weight"] for part in ("w1", "w3", "w2")]
    root = f"model.layers.{layer}.mlp.experts.{expert}."
    return [tensors[f"{root}{part}_proj.weight"] for part in ("gate", "up", "down")]


def values_of(bundle: Bundle, name: str) -> np.ndarray:
    """A blob's values in float32; of codes with their scales."""
    blob, data = bundle.blob(name), bundle.map(name)
    if blob.layout != "plain":
        return Int8RowsLayout().unpack(data, bundle.map(f"{name}.scale"))
    return bf16_to_float32(data) if blob.dtype == "BF16" else data.astype(np.float32)


def check_same(found: np.ndarray, expected: np.ndarray, name: str, limit: float) -> None:
    """Rows of padding are zero; the rest is within limit (0: equal)."""
    assert not found[expected.shape[0] :].any(), name
    found = found[: expected.shape[0]]
    assert found.shape == expected.shape, name
    assert np.square(found - expected).sum() <= limit * np.square(expected).sum(), name


def test_every_weight_is_the_checkpoints(checkpoint: Path, converted: Path) -> None:
    tensors = read_tensors(checkpoint)
    with Bundle.open(converted) as bundle:
        check_blob_names(bundle.manifest, "bundle")
        family, spec = bundle.spec.family, bundle.spec
        root = ROOTS.get(family, "model.")
        expected = {
            "embedding": tensors[f"{root}embed_tokens.weight"],
            "final_norm": tensors[f"{root}norm.weight"],
            "lm_head": tensors["lm_head.weight"],
        }
        for i in range(len(spec.layers)):
            dense = dense_of(family, i, tensors)
            expected |= {f"layers.{i}.{name}": values for name, values in dense.items()}
        stored = {one.name for one in bundle.manifest.blobs if one.tier == "dense"}
        assert {name for name in stored if not name.endswith(".scale")} == expected.keys()
        for name, values in expected.items():
            is_plain = bundle.blob(name).layout == "plain"
            assert not name.endswith("bias") or bundle.blob(name).dtype == "F32"
            check_same(values_of(bundle, name), values, name, 0 if is_plain else 1e-4)
        with_experts = [i for i in range(len(spec.layers)) if not (family in FIRST_DENSE and i == 0)]
        assert list(spec.expert_layers) == with_experts
        for i in with_experts:
            for tier, limit in (("gpu", 0.02), ("cpu", 1e-4)):
                blob = bundle.blob(f"layers.{i}.experts.{tier}")
                layout, records = layout_from_id(blob.layout), bundle.map(blob.name)
                for expert in range(8):
                    parts = layout.unpack_expert(
                        records[expert], spec.hidden, spec.experts_of(i).intermediate
                    )
                    for part, values in zip(parts, expert_of(family, i, expert, tensors), strict=True):
                        check_same(part, values, f"{blob.name}, {expert}", limit)


# Programs are known to save these so; transformers renames more than the block in others.
@pytest.mark.parametrize("checkpoint", FAMILIES[:5], indirect=True)
def test_names_of_the_model_in_memory_do_too(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    """As programs save it that write transformers' state as it is: gate and up of all experts in one."""
    import torch
    from safetensors.torch import save_file

    family = json.loads((checkpoint / "config.json").read_text("utf-8"))["model_type"]
    state = {name: one.to(torch.bfloat16) for name, one in reference_model(family).state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").symlink_to(checkpoint / "config.json")
    shards = {
        name: digest
        for name, digest in run([tmp_path / "hf"], tmp_path / "out.krasis", **SETTINGS).files().items()
        if name.endswith("safetensors")
    }
    assert shards.items() <= tree_digests(converted).items()


@pytest.mark.parametrize("dense", ["F32", "Q8_0"])
def test_a_gguf_gives_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path, dense: str
) -> None:
    """Rows that a GGUF orders otherwise are back in their order, whatever their type."""
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf", dense=dense)
    other = run([path], tmp_path / "gguf.krasis", **SETTINGS)
    with Bundle.open(converted) as ours, Bundle.open(other.path) as theirs:
        differing = _different_fields(ours, theirs)
        # llama.cpp has one architecture for all of DeepSeek's form.
        assert differing <= {"sum_epsilon", "max_positions", "family"}, differing
        assert ours.spec.family == theirs.spec.family or ours.spec.family == "glm4_moe_lite"
        for blob in ours.manifest.blobs:
            if blob.tier != "dense":
                assert np.array_equal(ours.map(blob.name), theirs.map(blob.name)), blob.name
            elif not blob.name.endswith(".scale"):
                is_exact = dense == "F32" or len(blob.shape) == 1
                limit = 0 if is_exact else 1e-3
                check_same(values_of(theirs, blob.name), values_of(ours, blob.name), blob.name, limit)


def _different_fields(ours: Bundle, theirs: Bundle) -> set[str]:
    """Names of the model's fields that differ."""
    found: set[str] = set()

    def compare(first: Any, second: Any, name: str) -> None:
        if dataclasses.is_dataclass(first) and type(first) is type(second):
            for entry in dataclasses.fields(first):
                compare(getattr(first, entry.name), getattr(second, entry.name), entry.name)
        elif isinstance(first, tuple):
            for one, other in zip(first, second, strict=True):
                compare(one, other, name)
        elif isinstance(first, float) and isinstance(second, float):
            if not np.isclose(first, second, rtol=1e-6):
                found.add(name)
        elif first != second:
            found.add(name)

    compare(ours.spec, theirs.spec, "spec")
    return found


@pytest.mark.parametrize("checkpoint", ["deepseek_v3"], indirect=True)
@pytest.mark.parametrize("dense", ["F32", "Q8_0"])
def test_an_old_gguf_of_latents_gives_the_same(
    checkpoint: Path, converted: Path, run: Callable[..., Any], tmp_path: Path, dense: str
) -> None:
    """Keys and values in one tensor, whose quantised rows cannot be turned as they are."""
    path = tiny_gguf(checkpoint, tmp_path / "old.gguf", dense=dense, together=True)
    assert "blk.1.attn_kv_b.weight" in {one.name for one in gguf.GGUFReader(path).tensors}
    other = run([path], tmp_path / "gguf.krasis", tiers=("cpu",))
    with Bundle.open(converted) as ours, Bundle.open(other.path) as theirs:
        assert not _different_fields(ours, theirs) - {"sum_epsilon", "max_positions"}
        for part in ("k_b", "v_b"):
            values = (values_of(one, f"layers.1.attention.{part}") for one in (theirs, ours))
            check_same(*values, part, 0 if dense == "F32" else 1e-3)
    both = run([checkpoint, path], tmp_path / "both.krasis", tiers=("cpu",))
    assert "layers.1.attention.v_b" in {blob.name for blob in Bundle.open(both.path).manifest.blobs}


def test_both_are_told_to_be_the_same_model(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_gguf(checkpoint, tmp_path / "tiny.gguf", experts="Q8_0", dense="Q8_0")
    bundle = run([checkpoint, path], tmp_path / "out.krasis", tiers=("cpu",))
    assert bundle.summary.quality["experts.cpu.w13"]["relative_mse"] == 0.0


def test_rows_in_another_order_are_another_model(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("mixtral", tmp_path / "hf")
    monkeypatch.setattr("tiny_ggufs.permuted", lambda values, heads: values)
    path = tiny_gguf(source, tmp_path / "tiny.gguf")
    with pytest.raises(MismatchError, match=r"attn_[qk]\.weight.*another model"):
        run([source, path], tmp_path / "out.krasis")


def test_llama_cpp_writes_the_same_gguf(checkpoint: Path, tmp_path: Path) -> None:
    """What these tests write by the gguf package is what llama.cpp's converter makes of the checkpoint."""
    if llama_cpp() is None:
        pytest.skip("KRASIS_LLAMA_CPP does not name the folder of llama.cpp's sources")
    if checkpoint.parent.name.startswith("mistral4"):
        pytest.skip("llama.cpp takes this model only within one of pictures and text")
    ours = gguf.GGUFReader(tiny_gguf(checkpoint, tmp_path / "ours.gguf"))
    theirs = gguf.GGUFReader(convert_by_llama_cpp(checkpoint, tmp_path / "theirs.gguf"))
    tensors = {one.name: one for one in theirs.tensors}
    assert {one.name for one in ours.tensors} == tensors.keys()
    for one in ours.tensors:
        assert np.array_equal(one.data, tensors[one.name].data), one.name
    for key, field in ours.fields.items():
        if not key.startswith(("GGUF.", "general.")) and not key.endswith("vocab_size"):
            assert theirs.fields[key].contents() == field.contents(), key


# ---- what is left out, and what is not ---------------------------------------------------------------------


def with_extra(folder: Path, source: Path, extra: dict[str, np.ndarray], **changes: Any) -> Path:
    """A copy of a checkpoint with more tensors and another config."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_safetensors(
        folder / "model-00002-of-00002.safetensors", {name: ("F32", data) for name, data in extra.items()}
    )
    names = dict.fromkeys(read_tensors(source), "model-00001-of-00002.safetensors")
    names |= dict.fromkeys(extra, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("glm4_moe", tmp_path_factory.mktemp("glm") / "hf")


DRAFT = {
    "model.layers.3.eh_proj.weight": np.ones((128, 256), np.float32),
    "model.layers.3.self_attn.q_proj.weight": np.ones((128, 128), np.float32),
    "model.layers.3.shared_head.head.weight": np.ones((320, 128), np.float32),
}


def test_drafting_layers_are_left_out_with_a_note(glm: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    plain = run([glm], tmp_path / "plain.krasis", **SETTINGS)
    source = with_extra(tmp_path / "hf", glm, DRAFT, num_nextn_predict_layers=1)
    bundle = run([source], tmp_path / "out.krasis", **SETTINGS)
    assert "3 tensors of layers that only draft (multi-token prediction) are left out" in bundle.messages
    assert "left out" not in plain.messages
    shards = {name: digest for name, digest in bundle.files().items() if name.endswith("safetensors")}
    assert shards.items() <= plain.files().items()
    with Bundle.open(bundle.path) as opened:
        assert (len(opened.spec.layers), opened.spec.draft_layers) == (3, 1)


def test_drafting_layers_of_a_gguf_too(glm: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    extra = {"model.layers.3.eh_proj.weight": np.ones((128, 256), np.float32)}
    extra["model.layers.3.input_layernorm.weight"] = np.ones(128, np.float32)
    source = with_extra(tmp_path / "hf", glm, extra, num_nextn_predict_layers=1)
    path = tiny_gguf(source, tmp_path / "tiny.gguf")
    assert "blk.3.nextn.eh_proj.weight" in {one.name for one in gguf.GGUFReader(path).tensors}
    bundle = run([path], tmp_path / "out.krasis", **SETTINGS)
    assert "2 tensors of layers that only draft" in bundle.messages


def test_what_ernie_drafts_with_is_left_out(run: Callable[..., Any], tmp_path: Path) -> None:
    """It lies beside the layers, under names of its own."""
    ernie = tiny("ernie4_5_moe", tmp_path / "plain")
    extra = {
        f"model.mtp_{name}.weight": np.ones((4, 4), np.float32)
        for name in ("block.0.self_attn.q_proj", "emb_norm.0", "hidden_norm.0", "linear_proj.0")
    }
    bundle = run([with_extra(tmp_path / "hf", ernie, extra)], tmp_path / "out.krasis", tiers=("cpu",))
    assert "4 tensors of layers that only draft (multi-token prediction) are left out" in bundle.messages
    extra = {"model.mlp.weight": np.ones((4, 4), np.float32)}
    source = with_extra(tmp_path / "other", tiny("ernie4_5_moe", tmp_path / "again"), extra)
    with pytest.raises(UnsupportedModelError, match=r"'model.mlp.weight' is not part of a ernie4_5_moe"):
        run([source], tmp_path / "other.krasis")


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("model.layers.3.eh_proj.weight", 0),  # nothing says that this layer drafts
        ("model.layers.4.eh_proj.weight", 1),
        ("model.layers.30.eh_proj.weight", 1),
        ("model.layers.2.eh_proj.weight", 1),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", 1),
        ("model.layers.1.self_attn.o_proj.bias", 1),
    ],
)
def test_nothing_else_is_left_out(
    glm: Path, run: Callable[..., Any], tmp_path: Path, name: str, declared: int
) -> None:
    extra = {name: np.ones((4, 4), np.float32)}
    source = with_extra(tmp_path / "hf", glm, extra, num_nextn_predict_layers=declared)
    with pytest.raises(UnsupportedModelError, match="is not part of a glm4_moe model") as caught:
        run([source], tmp_path / "out.krasis")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.self_attn.k_proj.bias",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ],
)
def test_every_tensor_is_asked_for(glm: Path, run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    tensors = {key: ("F32", data) for key, data in read_tensors(glm).items() if key != name}
    (tmp_path / "hf").mkdir()
    write_safetensors(tmp_path / "hf" / "model.safetensors", tensors)
    (tmp_path / "hf" / "config.json").symlink_to(glm / "config.json")
    with pytest.raises(FormatError, match=f"'{name}' is missing"):
        run([tmp_path / "hf"], tmp_path / "out.krasis")


def test_biases_of_zeros_are_no_alarm(glm: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    zeroed = {
        key: np.zeros_like(data) if key.endswith("bias") else data for key, data in read_tensors(glm).items()
    }
    (tmp_path / "hf").mkdir()
    write_safetensors(
        tmp_path / "hf" / "model.safetensors", {key: ("F32", one) for key, one in zeroed.items()}
    )
    (tmp_path / "hf" / "config.json").symlink_to(glm / "config.json")
    with Bundle.open(run([tmp_path / "hf"], tmp_path / "out.krasis", tiers=("cpu",)).path) as bundle:
        assert not bundle.map("layers.1.attention.qkv.bias").any()


def test_parts_that_end_inside_a_strip(run: Callable[..., Any], tmp_path: Path) -> None:
    """Three heads of 16 and one key head: 48, 16 and 16 rows stand beside each other, biases likewise."""
    changes = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16}
    source = tiny("glm4_moe", tmp_path / "hf", **changes)
    tensors = read_tensors(source)
    with Bundle.open(run([source], tmp_path / "out.krasis", tiers=("cpu",)).path) as bundle:
        assert bundle.blob("layers.1.attention.qkv").shape[0] * 32 == 128
        for name, values in dense_of("glm4_moe", 1, tensors).items():
            check_same(values_of(bundle, f"layers.1.{name}"), values, name, 1e-4)
        assert bundle.map("layers.1.attention.qkv.bias").shape == (96 + 2 * 16,)


def test_a_dry_run_counts_experts_where_they_are(glm: Path, tmp_path: Path) -> None:
    prepared = prepare([glm], tmp_path / "out.krasis", ConvertSettings(**SETTINGS), Reporter(0))
    planned = dry_run(prepared)
    assert planned.estimate.pack_s > 0
    assert sum("experts" in blob.name and blob.tier == "gpu" for blob in prepared.plan.blobs) == 2
    sizes = [piece.nbytes // 2 for piece in read_tensors(glm).values()]  # BF16, here as float32
    assert planned.source_bytes == sum(sizes)
    bundle = convert(prepared, Reporter(0))
    assert bundle.source_bytes == planned.source_bytes
    assert dict(bundle.tier_bytes) == dict(planned.tier_bytes)


@pytest.mark.parametrize("size", [64, 128, 256])  # of hidden 128: either pair of matrices may be square
def test_experts_turned_or_not_are_the_same(run: Callable[..., Any], tmp_path: Path, size: int) -> None:
    """The hub has them turned, transformers saves them either way: both matrices' shapes together tell. The
    vision tower is left out."""
    source = tiny("qwen3_vl_moe", tmp_path / "turned", moe_intermediate_size=size)
    turned = run([source], tmp_path / "turned.krasis", **SETTINGS)
    assert "tensors of the vision tower are left out" in turned.messages
    turn_experts(source)
    assert run([source], tmp_path / "plain.krasis", **SETTINGS).files() == turned.files()
    tensors = read_tensors(source)
    with Bundle.open(turned.path) as bundle:
        blob = bundle.blob("layers.2.experts.cpu")
        record = bundle.map(blob.name)[5]
        gate, up, down = layout_from_id(blob.layout).unpack_expert(record, 128, size)
    root = "model.language_model.layers.2.mlp.experts."
    check_same(np.concatenate([gate, up]), tensors[f"{root}gate_up_proj"][5], "gate, up", 1e-4)
    check_same(down, tensors[f"{root}down_proj"][5], "down", 1e-4)


def test_a_calibration_has_layers_with_experts_only(
    glm: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    path, plain = tmp_path / "importance.h5", run([glm], tmp_path / "a.krasis", tiers=("gpu",), **SETTINGS)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for layer in (1, 2):
            file[f"layers/{layer}/hidden"] = rng.random((8, 128)).astype(np.float32)
            file[f"layers/{layer}/intermediate"] = rng.random((8, 64)).astype(np.float32)
    weighted = run([glm], tmp_path / "b.krasis", tiers=("gpu",), calibration=path, **SETTINGS)
    before, after = plain.files(), weighted.files()
    assert before["dense-000.safetensors"] == after["dense-000.safetensors"]
    assert before["gpu-000.safetensors"] != after["gpu-000.safetensors"]


class DiskFails(FileOps):
    """A disk that fails at the n-th write."""

    def __init__(self, num_writes: int) -> None:
        self.left = num_writes

    def pwrite(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().pwrite(*arguments)


@pytest.mark.parametrize("num_writes", [12, 30, 60])
def test_a_model_with_layers_of_both_kinds_is_resumed(
    glm: Path, run: Callable[..., Any], tmp_path: Path, num_writes: int
) -> None:
    whole = run([glm], tmp_path / "whole.krasis", **SETTINGS).files()
    with pytest.raises(ResourceError):
        run([glm], tmp_path / "out.krasis", DiskFails(num_writes), **SETTINGS)
    assert run([glm], tmp_path / "out.krasis", **SETTINGS).files() == whole
