"""What a bundle holds, recomputed with NumPy from the model's weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.layouts import MarlinLayout


def int8_rows(weight):
    """Codes and scales of a row-wise absmax quantiser, [n, k] and [n]."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def unpack_int8(packed):
    """[n/32, k/4, 32, 4] to [n, k]."""
    strips, words, rows, lanes = packed.shape
    return packed.transpose(0, 2, 1, 3).reshape(strips * rows, words * lanes)


def unpack_q8_tiles(data, n, k):
    """Tiled q8 bytes to codes [n, k] and scales [n, k/32], as the format's page describes them."""
    tiles = data.reshape(n // 32, k // 32, 1088)
    codes = tiles[..., :1024].copy().view(np.int8).reshape(n // 32, k // 32, 8, 32, 4)
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(n, k)
    scales = tiles[..., 1024:].copy().view(np.float16).transpose(0, 2, 1).reshape(n, k // 32)
    return codes, scales


def q8_0_blocks(weight):
    """Codes [n, k] and scales [n, k/32] that the gguf package makes of a weight."""
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0).reshape(weight.shape[0], -1, 34)
    return raw[..., 2:].view(np.int8).reshape(weight.shape), raw[..., :2].copy().view(np.float16)[..., 0]


@pytest.fixture(scope="module")
def opened(bundle):
    with Bundle.open(bundle.path) as reader:
        yield reader


def test_the_bundle_verifies(bundle):
    assert verify_bundle(bundle.path) == []


def test_a_reference_reader_opens_every_shard(bundle):
    import safetensors

    names = set()
    for path in bundle.path.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            names.update(file.keys())
    assert {"layers.1.experts.gpu", "layers.0.experts.cpu", "lm_head.scale"} <= names


@pytest.mark.parametrize(
    ("blob", "parts"),
    [
        ("layers.1.attention.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("layers.0.attention.output", ["self_attn.o_proj"]),
    ],
)
def test_attention_is_int8_rows_of_the_checkpoint(opened, model, blob, parts):
    layer = blob.split(".")[1]
    weight = np.concatenate([model.weights[f"model.layers.{layer}.{part}.weight"] for part in parts])
    codes, scales = int8_rows(weight)
    found = unpack_int8(opened.map(blob))
    # A tie may round either way: the scale's division is not the same instruction.
    assert np.abs(found.astype(int) - codes).max() <= 1
    assert (found != codes).mean() < 1e-3
    np.testing.assert_allclose(opened.map(f"{blob}.scale"), scales, rtol=1e-6)


def test_head_is_padded_with_zero_rows(opened, model):
    weight = model.weights["lm_head.weight"]
    codes, scales = int8_rows(weight)
    found = unpack_int8(opened.map("lm_head"))
    assert found.shape == (128, 128)
    assert not found[100:].any()
    assert (found[:100] != codes).mean() < 1e-3
    np.testing.assert_allclose(opened.map("lm_head.scale")[:100], scales, rtol=1e-6)


@pytest.mark.parametrize(
    ("blob", "name"),
    [
        ("embedding", "model.embed_tokens.weight"),
        ("final_norm", "model.norm.weight"),
        ("layers.1.attention.q_norm", "model.layers.1.self_attn.q_norm.weight"),
        ("layers.1.attention.k_norm", "model.layers.1.self_attn.k_norm.weight"),
        ("layers.0.attention.norm", "model.layers.0.input_layernorm.weight"),
        ("layers.0.experts.norm", "model.layers.0.post_attention_layernorm.weight"),
        ("layers.1.experts.router", "model.layers.1.mlp.gate.weight"),
    ],
)
def test_small_tensors_keep_their_bits(opened, model, blob, name):
    record = opened.blob(blob)
    assert record.dtype == "BF16"
    found = opened.map(blob).astype(np.uint32) << 16
    np.testing.assert_array_equal(found.view(np.float32), model.weights[name])


def test_cpu_experts_are_the_ggufs_own_codes_and_scales(opened, model):
    for layer in range(2):
        records = opened.map(f"layers.{layer}.experts.cpu")
        for expert in range(4):
            gate, up, down = (
                q8_0_blocks(model.expert(layer, expert, part)) for part in ("gate", "up", "down")
            )
            w13_bytes = (256 // 32) * (128 // 32) * 1088
            codes, scales = unpack_q8_tiles(records[expert, :w13_bytes], 256, 128)
            for half, (expected_codes, expected_scales) in enumerate((gate, up)):
                rows = codes.reshape(8, 2, 16, 128)[:, half].reshape(128, 128)
                np.testing.assert_array_equal(rows, expected_codes)
                found = scales.reshape(8, 2, 16, 4)[:, half].reshape(128, 4)
                np.testing.assert_array_equal(found.view(np.uint16), expected_scales.view(np.uint16))
            w2_bytes = (128 // 32) * (128 // 32) * 1088
            codes, scales = unpack_q8_tiles(records[expert, w13_bytes : w13_bytes + w2_bytes], 128, 128)
            np.testing.assert_array_equal(codes, down[0])
            np.testing.assert_array_equal(scales.view(np.uint16), down[1].view(np.uint16))
            assert not records[expert, w13_bytes + w2_bytes :].any()


def test_gpu_experts_are_the_checkpoint_within_int4(opened, model, bundle):
    records = opened.map("layers.1.experts.gpu")
    total_error = total = 0.0
    for expert in range(4):
        unpacked = MarlinLayout(4, 128, "BF16").unpack_expert(np.ascontiguousarray(records[expert]), 128, 128)
        for part, found in zip(("gate", "up", "down"), unpacked, strict=True):
            expected = model.expert(1, expert, part).astype(np.float64)
            total_error += np.square(found - expected).sum()
            total += np.square(expected).sum()
            # Half a step of 15 levels over the group's range, with room for clipped outliers.
            assert np.abs(found - expected).max() < np.abs(expected).max() / 4
    assert 0.004 < total_error / total < 0.012


def test_quality_in_the_manifest_is_what_unpacking_shows(opened, model):
    error = total = 0.0
    for layer in range(2):
        records = opened.map(f"layers.{layer}.experts.gpu")
        for expert in range(4):
            layout = MarlinLayout(4, 128, "BF16")
            gate, up, _ = layout.unpack_expert(np.ascontiguousarray(records[expert]), 128, 128)
            for part, found in (("gate", gate), ("up", up)):
                expected = model.expert(layer, expert, part).astype(np.float64)
                error += np.square(found - expected).sum()
                total += np.square(expected).sum()
    recorded = opened.manifest.quality["experts.gpu.w13"]
    assert recorded["relative_mse"] == pytest.approx(error / total, rel=1e-4)
    assert recorded["count"] == 2 * 4 * 2 * 128 * 128
    assert opened.manifest.quality["experts.cpu.w2"]["relative_mse"] == 0.0


def test_manifest_names_sources_recipe_and_architecture(opened, hf_dir, q8_gguf):
    manifest = opened.manifest
    kinds = {(source.name, source.kind) for source in manifest.sources}
    assert kinds == {
        ("model-00001-of-00002.safetensors", "hf"),
        ("model-00002-of-00002.safetensors", "hf"),
        ("tiny-q8_0.gguf", "gguf"),
    }
    assert manifest.layouts == {
        "dense": "int8-rows-r32k4",
        "gpu": "marlin-u4b8-g128-bf16",
        "cpu": "cpu-q8-r32-b32",
    }
    assert manifest.recipe["cpu_experts_from"] == "gguf: Q8_0"
    assert manifest.recipe["gpu_experts_from"] == "hf: BF16"
    assert manifest.architecture.num_layers == 2


def test_text_assets_are_copied(opened, hf_dir):
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert opened.asset(name) == (hf_dir / name).read_bytes()
