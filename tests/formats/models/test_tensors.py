"""The list of tensors against what the converter has always written, and the names it reads by."""

import json

import pytest

from krasis.convert.cli import main
from krasis.formats.models.registry import all_families, spec_from_hf
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import blobs, layer_tensors, top_tensors
from krasis.formats.models.uniform import architecture_of, spec_of

TINY = "tests/assets/tiny-qwen3-moe"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, request):
    source = request.config.rootpath / TINY
    path = tmp_path_factory.mktemp("tensors") / "tiny.krasis"
    with pytest.raises(SystemExit) as ended:
        main([str(source), "-o", str(path), "--quiet"])
    assert not ended.value.code
    return json.loads((path / "manifest.json").read_text())


def test_gives_every_dense_blob_of_a_bundle_in_its_order(manifest):
    spec = ModelSpec.from_json(manifest["model"])
    written = [
        (blob["name"], blob["dtype"], tuple(blob["shape"]))
        for blob in manifest["blobs"]
        if blob["tier"] == "dense"
    ]
    listed = [(blob.name, blob.dtype or "BF16", blob.shape) for blob in blobs(spec)]
    assert listed == written


def test_an_architecture_is_a_view_of_its_model(manifest):
    spec = ModelSpec.from_json(manifest["model"])
    assert spec_of(architecture_of(spec, "manifest")) == spec


@pytest.mark.parametrize("family", [f for f in all_families() if f.names], ids=lambda family: family.name)
def test_every_tensor_of_a_family_with_names_has_a_source(family, request):
    folder = request.config.rootpath / "tests" / "formats" / "models" / "configs"
    for path in folder.glob("*.json"):
        config = json.loads(path.read_text())
        if config["model_type"] not in family.model_types:
            continue
        spec = spec_from_hf(config, path.name)
        tensors = [tensor for side in top_tensors(spec) for tensor in side]
        tensors += [tensor for layer in set(spec.layers) for tensor in layer_tensors(spec, layer)]
        for tensor in tensors:
            prefix = "experts." if tensor.store == "experts" else ""
            for part in tensor.parts or (tensor.name,):
                assert f"{prefix}{part}" in family.names, tensor


def test_names_of_other_families():
    by_name = {family.name: family.names for family in all_families()}
    mixtral = by_name["mixtral"]
    assert mixtral["experts.up"].hf[0] == "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight"
    assert mixtral["attention.q"].gguf_transform == "undo_rope_permutation"
    assert mixtral["attention.v"].gguf_transform == "none"
    glm = by_name["glm4_moe"]
    assert glm["experts.norm"].gguf == ("blk.{i}.post_attention_norm.weight",)
    assert glm["experts.router.correction_bias"].gguf == ("blk.{i}.exp_probs_b.bias",)
    assert glm["shared.down_proj"].gguf == ("blk.{i}.ffn_down_shexp.weight",)
    assert by_name["minimax_m2"]["experts.router.correction_bias"].gguf == ("blk.{i}.exp_probs_b.bias",)
    assert by_name["hy_v3"]["experts.router.correction_bias"].gguf == ("blk.{i}.exp_probs_b",)
    assert by_name["hy_v3"]["experts.router"].hf == ("model.layers.{i}.mlp.router.gate.weight",)
    assert glm["attention.k.bias"].hf == ("model.layers.{i}.self_attn.k_proj.bias",)
