"""Every kind of input: either alone, split and per-expert GGUFs, all their types, fused checkpoints."""

from __future__ import annotations

import convert_gguf
import gguf
import numpy as np
import pytest

from krasis.convert.slices import TensorSlice
from krasis.formats.bundle.reader import Bundle
from krasis.formats.layouts import layout_from_id

PARTS = ("gate", "up", "down")


def unpacked(reader, tier, layer, expert):
    """One expert as float32 gate, up, down."""
    record = reader.blob(f"layers.{layer}.experts.{tier}")
    arch = reader.architecture
    layout = layout_from_id(record.layout)
    data = np.ascontiguousarray(reader.map(record.name)[expert])
    return layout.unpack_expert(data, arch.hidden_size, arch.expert_intermediate_size)


def relative_mse(found, expected):
    expected = expected.astype(np.float64)
    return np.square(found - expected).sum() / np.square(expected).sum()


def check_tier(path, tier, model, limit):
    with Bundle.open(path) as reader:
        for layer, expert in ((0, 0), (1, 3)):
            for part, found in zip(PARTS, unpacked(reader, tier, layer, expert), strict=True):
                assert relative_mse(found, model.expert(layer, expert, part)) < limit


def test_checkpoint_alone(run, hf_dir, model, tmp_path):
    bundle = run([hf_dir], tmp_path / "out.krasis")
    check_tier(bundle.path, "cpu", model, 1e-4)
    check_tier(bundle.path, "gpu", model, 0.012)
    assert "without a GGUF the CPU experts are made from the checkpoint" in bundle.messages


def test_gguf_alone(run, q8_gguf, model, tmp_path):
    bundle = run([q8_gguf], tmp_path / "out.krasis")
    check_tier(bundle.path, "cpu", model, 1e-4)
    check_tier(bundle.path, "gpu", model, 0.012)
    assert "without a BF16 checkpoint" in bundle.messages
    with Bundle.open(bundle.path) as reader:
        assert reader.blob("embedding").dtype == "F32"
        weight = model.weights["model.embed_tokens.weight"]
        exact = gguf.quants.dequantize(
            gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        )
        np.testing.assert_array_equal(reader.map("embedding"), exact)
        router = reader.map("layers.1.experts.router")
        np.testing.assert_array_equal(router, model.weights["model.layers.1.mlp.gate.weight"])


def test_split_and_per_expert_ggufs_give_the_bytes_of_a_merged_one(run, hf_dir, model, bundle, tmp_path):
    for kind, options in (("split", {"split": 5}), ("loose", {"merged": False})):
        path = model.write_gguf(tmp_path / kind / "tiny-q8_0.gguf", **options)
        files = run([hf_dir, path], tmp_path / f"{kind}.krasis").files()
        for name in ("cpu-000.safetensors", "gpu-000.safetensors", "dense-000.safetensors"):
            assert files[name] == bundle.files()[name], kind


def test_any_file_of_a_split_gguf_or_its_folder_will_do(run, hf_dir, model, bundle, tmp_path):
    first = model.write_gguf(tmp_path / "split" / "tiny.gguf", split=10)
    later = sorted(first.parent.iterdir())[-1]
    assert later != first
    for number, path in enumerate((later, first.parent)):
        files = run([path, hf_dir], tmp_path / f"{number}.krasis").files()
        assert files["cpu-000.safetensors"] == bundle.files()["cpu-000.safetensors"]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q4_0", "Q5_1"])
def test_other_gguf_types_are_kept_or_requantised_and_named(run, hf_dir, model, tmp_path, dtype):
    path = model.write_gguf(tmp_path / "tiny.gguf", experts=dtype, dense="F16")
    bundle = run([hf_dir, path], tmp_path / "out.krasis", tiers=("cpu",))
    rounded = gguf.quants.dequantize(
        gguf.quants.quantize(model.expert(1, 3, "down"), gguf.GGMLQuantizationType[dtype]),
        gguf.GGMLQuantizationType[dtype],
    )
    with Bundle.open(bundle.path) as reader:
        assert "gpu" not in reader.manifest.layouts
        down = unpacked(reader, "cpu", 1, 3)[2]
        assert relative_mse(down, rounded) < 1e-4
    assert (f"{dtype} experts are dequantised and rounded again" in bundle.messages) == (dtype == "Q5_1")
    assert (f"{dtype} experts are kept as they are, without loss" in bundle.messages) == (dtype == "Q4_0")


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K"])
def test_k_quants(run, model_class, shape_class, tmp_path, dtype):
    model = model_class(shape_class(hidden=256, intermediate=256)).with_blocks(dtype)
    hf = model.write_hf(tmp_path / "hf")
    path = model.write_gguf(tmp_path / "tiny.gguf", experts=dtype)
    bundle = run([hf, path], tmp_path / "out.krasis")
    check_tier(bundle.path, "cpu", model, 1e-4)
    assert f"{dtype} experts are dequantised" in bundle.messages
    # Alone, without BF16: merged or per expert, the GPU tier comes from the same blocks.
    loose = model.write_gguf(tmp_path / "loose.gguf", experts=dtype, merged=False)
    alone = [run([file], tmp_path / f"{file.stem}.krasis").files() for file in (path, loose)]
    assert alone[0]["gpu-000.safetensors"] == alone[1]["gpu-000.safetensors"]
    assert alone[0]["cpu-000.safetensors"] == bundle.files()["cpu-000.safetensors"]


def test_a_gguf_of_mixed_types_keeps_its_q8_0_part_lossless(run, hf_dir, model, tmp_path, monkeypatch):
    add = convert_gguf.add_tensor

    def mixed(writer, name, values, dtype, raw=None):
        add(writer, name, values, "F16" if "ffn_down_exps" in name else dtype, raw)

    with monkeypatch.context() as patched:
        patched.setattr(convert_gguf, "add_tensor", mixed)
        path = model.write_gguf(tmp_path / "mixed.gguf")
    bundle = run([hf_dir, path], tmp_path / "out.krasis", tiers=("cpu",))
    assert bundle.summary.quality["experts.cpu.w13"]["relative_mse"] == 0.0
    assert 0 < bundle.summary.quality["experts.cpu.w2"]["relative_mse"] < 1e-4


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_checkpoints_of_other_float_types(run, model, tmp_path, dtype):
    hf = model.write_hf(tmp_path / "hf", dtype=dtype, num_files=1)
    for number, path in enumerate((hf, hf / "model.safetensors")):
        bundle = run([path], tmp_path / f"{number}.krasis")
        check_tier(bundle.path, "gpu", model, 0.012)
        with Bundle.open(bundle.path) as reader:
            assert reader.blob("final_norm").dtype == dtype


def test_fused_experts_give_the_same_shards(run, model, bundle, q8_gguf, tmp_path):
    hf = model.write_hf(tmp_path / "hf", fused=True)
    files = run([hf, q8_gguf], tmp_path / "out.krasis").files()
    assert files["gpu-000.safetensors"] == bundle.files()["gpu-000.safetensors"]


@pytest.mark.parametrize(
    ("settings", "tier", "layout", "limit"),
    [
        ({"gpu_group": 64}, "gpu", "marlin-u4b8-g64-bf16", 0.010),
        ({"gpu_group": 32, "gpu_scales": "f16"}, "gpu", "marlin-u4b8-g32-f16", 0.008),
        ({"gpu_group": None}, "gpu", "marlin-u4b8-gchannel-bf16", 0.012),
        ({"gpu_bits": 8}, "gpu", "marlin-u8b128-g128-bf16", 1e-4),
        ({"cpu_format": "int4"}, "cpu", "cpu-i4-r32-b32", 0.008),
    ],
)
def test_layout_options(run, hf_dir, q8_gguf, model, tmp_path, settings, tier, layout, limit):
    bundle = run([hf_dir, q8_gguf], tmp_path / "out.krasis", **settings)
    with Bundle.open(bundle.path) as reader:
        assert reader.manifest.layouts[tier] == layout
    check_tier(bundle.path, tier, model, limit)


def test_tied_embeddings_give_a_packed_head_all_the_same(run, model_class, shape_class, tmp_path):
    model = model_class(shape_class(tied=True))
    hf, path = model.write_hf(tmp_path / "hf"), model.write_gguf(tmp_path / "tiny.gguf")
    bundle = run([hf, path], tmp_path / "out.krasis")
    with Bundle.open(bundle.path) as reader:
        assert reader.architecture.tie_word_embeddings
        codes = reader.map("lm_head").transpose(0, 2, 1, 3).reshape(128, 128)
        found = codes * reader.map("lm_head.scale")[:, None]
        assert relative_mse(found[:100], model.weights["model.embed_tokens.weight"]) < 1e-4


def test_large_tensors_are_dealt_with_in_chunks(run, hf_dir, q8_gguf, bundle, tmp_path, monkeypatch):
    import krasis.convert.dense

    monkeypatch.setattr(krasis.convert.dense, "CHUNK_BYTES", 32 * 4 * 128)  # 32 rows
    files = run([hf_dir, q8_gguf], tmp_path / "out.krasis").files()
    # Statistics are summed in another order; the weights are the same.
    for name in ("cpu-000.safetensors", "gpu-000.safetensors", "dense-000.safetensors"):
        assert files[name] == bundle.files()[name]


@pytest.mark.parametrize("slab_bytes", [0, 130_000])
def test_buffers_of_any_size_give_the_same_bytes(
    run, hf_dir, q8_gguf, bundle, tmp_path, monkeypatch, slab_bytes
):
    monkeypatch.setattr("krasis.convert.plan.STAGING_CHOICES", ((2, slab_bytes),))
    assert run([hf_dir, q8_gguf], tmp_path / "out.krasis").files() == bundle.files()


def test_a_checkpoint_made_of_links_is_read(run, hf_dir, q8_gguf, bundle, tmp_path):
    """As the Hugging Face cache keeps them."""
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in hf_dir.iterdir():
        (links / path.name).symlink_to(path)
    assert run([links, q8_gguf], tmp_path / "out.krasis").files() == bundle.files()


def test_misaligned_safetensors_are_read(run, model, tmp_path, bundle):
    hf = model.write_hf(tmp_path / "hf", num_files=1)
    path = hf / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    files = run([hf], tmp_path / "out.krasis", tiers=("gpu",)).files()
    assert files["gpu-000.safetensors"] == bundle.files()["gpu-000.safetensors"]


def test_slices_of_rows_decode_to_those_rows():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    piece = TensorSlice("t", "file: 't'", "F32", (4, 3), values.view(np.uint8).reshape(-1), 0, 48)
    rows = piece.rows(1, 9)
    assert (rows.shape, rows.offset_bytes) == ((3, 3), 12)
    np.testing.assert_array_equal(rows.decode(), values[1:])
