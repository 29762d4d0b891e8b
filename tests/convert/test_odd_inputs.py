"""Inputs as people have them: folders with more in them, caches, pieces, other things under a model's name.

What is clear is converted, and the bundle is that of the plain input; what is not is refused with the way
out.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from krasis.convert.inputs import recognise
from krasis.formats.errors import (
    FormatError,
    KrasisError,
    MismatchError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4932342232\n"
SETTINGS = {"gpu_group": 64, "tiers": ("cpu",), "num_threads": 1}


@pytest.fixture
def copy(hf_dir, tmp_path) -> Path:
    return shutil.copytree(hf_dir, tmp_path / "copy")


@pytest.fixture(scope="module")
def plain(run, hf_dir, tmp_path_factory):
    """The bundle that every clear form of the checkpoint gives, its shards' digests."""
    bundle = run([hf_dir], tmp_path_factory.mktemp("plain") / "m.krasis", **SETTINGS)
    return shards_of(bundle)


def shards_of(bundle) -> dict[str, str]:
    return {name: digest for name, digest in bundle.files().items() if name.endswith(".safetensors")}


def refuse(run, path, tmp_path, error, *parts) -> None:
    with pytest.raises(KrasisError) as caught:
        run([path], tmp_path / "refused.krasis", **SETTINGS)
    assert type(caught.value) is error, caught.value
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "refused.krasis").exists()
    assert "\n" not in str(caught.value)


# ---- folders with more in them -----------------------------------------------------------------------------


def test_a_second_index_and_other_weights_are_left_alone_with_a_note(run, copy, tmp_path, plain):
    shutil.copy(copy / "model.safetensors.index.json", copy / "consolidated.safetensors.index.json")
    shutil.copy(copy / "model-00001-of-00002.safetensors", copy / "consolidated.safetensors")
    (copy / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (copy / "original").mkdir()
    bundle = run([copy], tmp_path / "m.krasis", **SETTINGS)
    assert shards_of(bundle) == plain
    assert "adapter_model.safetensors, consolidated.safetensors left alone" in bundle.messages
    assert "the folder 'original' is left alone" in bundle.messages


def test_a_named_index_is_the_one_that_is_read(run, copy, tmp_path, plain):
    (copy / "model.safetensors.index.json").rename(copy / "x.safetensors.index.json")
    (copy / "y.safetensors.index.json").write_text('{"weight_map": {"a": "no.safetensors"}}')
    refuse(run, copy, tmp_path, FormatError, "several indexes", "name the one to read")
    bundle = run([copy / "x.safetensors.index.json"], tmp_path / "m.krasis", **SETTINGS)
    assert shards_of(bundle) == plain


def test_shards_with_a_buffer_the_index_lacks_and_a_tensor_twice(run, model, model_class, tmp_path, plain):
    extra = {**model.weights, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    folder = model_class(model.shape, 0, extra).write_hf(tmp_path / "hf")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"]
    path.write_text(json.dumps(index))
    assert set(shards_of(run([folder], tmp_path / "m.krasis", **SETTINGS))) == set(plain)


def test_an_unlisted_tensor_that_is_no_buffer_is_still_refused(run, model, model_class, tmp_path):
    extra = {**model.weights, "model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}
    folder = model_class(model.shape, 0, extra).write_hf(tmp_path / "hf")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.0.self_attn.q_proj.bias"]
    path.write_text(json.dumps(index))
    refuse(run, folder, tmp_path, UnsupportedModelError, "q_proj.bias' is not part")


# ---- the hub's cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(hf_dir, tmp_path) -> Path:
    """models--org--name as the hub's library keeps it: links into blobs."""
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(hf_dir.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return root


@pytest.mark.parametrize("which", [".", "snapshots", "snapshots/0123abc", ".."])
def test_every_level_of_the_hubs_cache_leads_to_its_snapshot(run, cache, tmp_path, plain, which):
    bundle = run([cache / which], tmp_path / "m.krasis", **SETTINGS)
    assert shards_of(bundle) == plain
    assert ("its snapshot 0123abc is taken" in bundle.messages) is (which != "snapshots/0123abc")


def test_several_snapshots_the_main_one_is_taken_else_named(cache):
    other = shutil.copytree(cache / "snapshots" / "0123abc", cache / "snapshots" / "456def", symlinks=True)
    with pytest.raises(UsageError, match=r"several snapshots.*'0123abc', '456def'.*name one"):
        recognise([cache])
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("456def\n")
    assert recognise([cache]).hf == other


def test_caches_without_a_clear_answer(cache, tmp_path):
    shutil.copytree(cache, cache.parent / "models--org--other", symlinks=True)
    with pytest.raises(UsageError, match=r"hub cache with several models.*models--org--name"):
        recognise([cache.parent])
    shutil.rmtree(cache / "snapshots" / "0123abc")
    with pytest.raises(FormatError, match=r"holds no snapshot.*download the model first"):
        recognise([cache])


def test_a_snapshot_copied_without_its_blobs(cache):
    shutil.rmtree(cache / "blobs")
    with pytest.raises(FormatError, match=r"links of this folder lead nowhere.*cp -rL"):
        recognise([cache])


def test_a_missing_path_may_be_a_name_on_the_hub():
    with pytest.raises(UsageError, match=r"no such file or folder.*give hf://Qwen/Qwen3-30B-A3B"):
        recognise([Path("Qwen/Qwen3-30B-A3B")])


# ---- other things under a model's name ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_pointers_of_git_lfs(run, copy, tmp_path, name):
    (copy / name).write_bytes(LFS)
    refuse(run, copy, tmp_path, FormatError, f"{name}: ", "git-lfs pointer", "4.93 GB", "git lfs pull")


def test_pointers_of_git_lfs_in_place_of_text_files(run, copy, tmp_path):
    (copy / "tokenizer.json").write_bytes(LFS)
    refuse(run, copy, tmp_path, FormatError, "tokenizer.json: ", "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("data", [b"<!doctype html><title>Sign in</title>", b""])
def test_error_pages_and_nothing_in_place_of_the_config(run, copy, tmp_path, data):
    (copy / "config.json").write_bytes(data)
    refuse(run, copy, tmp_path, FormatError, "config.json: ", "the download failed")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("data", "what"), [(b"<!doctype html><title>Sign in</title>", "a web page"), (b"", "the file is empty")]
)
def test_error_pages_and_nothing_in_place_of_text_files(run, copy, tmp_path, name, data, what):
    (copy / name).write_bytes(data)
    refuse(run, copy, tmp_path, FormatError, f"{name}: ", what, "--force-text")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["pytorch_model.bin"], ["PyTorch pickles", "any code", "safe_serialization"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["PyTorch pickles"]),
        (["consolidated.00.pth", "params.json"], ["PyTorch pickles", "consolidated.00.pth"]),
        (["model.ckpt"], ["PyTorch pickles"]),
        (["tf_model.h5"], ["as TensorFlow"]),
        (["model.zip"], ["as a zip archive", "unpack it"]),
        (
            ["model.gguf.part1of2", "model.gguf.part2of2"],
            ["cat model.gguf.part1of2 model.gguf.part2of2 > model.gguf"],
        ),
        (["model.gguf.part1of2"], ["piece 2 of 2 is missing"]),
        ([], ["no safetensors files", "weights were not downloaded"]),
    ],
)
def test_folders_whose_weights_are_something_else(tmp_path, run, names, parts):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    refuse(run, folder, tmp_path, FormatError, str(folder), *parts)


def test_weights_without_their_config_and_adapters(tmp_path, run, hf_dir):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(hf_dir / "model-00001-of-00002.safetensors", folder)
    refuse(run, folder, tmp_path, FormatError, "no config.json", "was not downloaded")
    (folder / "params.json").write_text("{}")
    refuse(run, folder, tmp_path, FormatError, "publisher's own format")
    (folder / "params.json").rename(folder / "adapter_config.json")
    refuse(run, folder, tmp_path, FormatError, "adapter (LoRA)")


def test_a_model_one_folder_below_is_named(tmp_path, run, hf_dir):
    shutil.copytree(hf_dir, tmp_path / "top" / "Qwen3")
    refuse(run, tmp_path / "top", tmp_path, FormatError, f"give {tmp_path / 'top' / 'Qwen3'}")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<html><title>404</title>", "HTML page"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00.", "Python pickle"),
        (b"", "file is empty"),
        (LFS, "git-lfs pointer"),
        (bytes(4096), "nothing but zeros"),
    ],
)
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model.bin"])
def test_files_that_are_something_else(tmp_path, run, data, words, name):
    (tmp_path / name).write_bytes(data)
    refuse(run, tmp_path / name, tmp_path, FormatError, words)


# ---- GGUF --------------------------------------------------------------------------------------------------


def test_fused_gate_and_up_give_the_same_bundle(run, model, q8_gguf, tmp_path):
    fused = model.write_gguf(tmp_path / "fused.gguf", fused=True)
    assert any("ffn_gate_up_exps" in tensor.name for tensor in gguf.GGUFReader(fused).tensors)
    settings = {"gpu_group": 64, "num_threads": 1}
    one = run([q8_gguf], tmp_path / "plain.krasis", **settings)
    two = run([fused], tmp_path / "fused.krasis", **settings)
    assert shards_of(one) == shards_of(two)
    assert one.summary.source_bytes == two.summary.source_bytes


def test_fused_beside_a_checkpoint_is_compared_with_it(run, model, hf_dir, q8_gguf, tmp_path, bundle):
    fused = model.write_gguf(tmp_path / "fused.gguf", fused=True)
    both = run([hf_dir, fused], tmp_path / "m.krasis")
    assert shards_of(both) == shards_of(bundle)

    def other(name: str) -> str:
        parts = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return ".".join(parts.get(part, part) for part in name.split("."))

    swapped = type(model)(model.shape, 0, {other(name): values for name, values in model.weights.items()})
    wrong = swapped.write_gguf(tmp_path / "wrong.gguf", fused=True)
    with pytest.raises(MismatchError):
        run([hf_dir, wrong], tmp_path / "w.krasis")


def patch_type(path: Path, tensor: str, number: int) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(tensor.encode()) + len(tensor)
    rank = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * rank, number)
    path.write_bytes(data)


@pytest.mark.parametrize(("number", "name"), [(144, "IQ4_KS"), (139, "IQ4_K"), (210, "Q2_K_R4")])
def test_types_of_ik_llama_cpp_are_named(run, q8_gguf, tmp_path, number, name):
    path = Path(shutil.copy(q8_gguf, tmp_path / f"{name}.gguf"))
    patch_type(path, "blk.1.ffn_down_exps.weight", number)
    refuse(run, path, tmp_path, FormatError, "ffn_down_exps", f"type {name} is ik_llama.cpp's own", "BF16")


def test_pieces_by_name_whichever_is_given(run, q8_gguf, tmp_path):
    data = q8_gguf.read_bytes()
    half = len(data) // 2
    for number, piece in ((1, data[:half]), (2, data[half:])):
        (tmp_path / f"m.gguf.part{number}of2").write_bytes(piece)
    for given in (tmp_path, tmp_path / "m.gguf.part1of2", tmp_path / "m.gguf.part2of2"):
        refuse(
            run, given, tmp_path, FormatError, "2 raw pieces", "cat m.gguf.part1of2 m.gguf.part2of2 > m.gguf"
        )
    (tmp_path / "m.gguf").write_bytes(data)  # joined, the pieces beside it do not matter
    assert recognise([tmp_path]).gguf == tmp_path / "m.gguf"


def test_split_files_with_missing_parts_and_parts_joined(run, model, tmp_path):
    folder = tmp_path / "split"
    first = model.write_gguf(folder / "m.gguf", split=8)
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) > 2
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    refuse(run, joined, tmp_path, FormatError, "several GGUF files were joined", "llama-gguf-split --merge")
    first.unlink()
    refuse(run, folder, tmp_path, FormatError, f"part {first.name!r} is missing")
    refuse(run, parts[1], tmp_path, FormatError, f"part {first.name!r} is missing")


def test_vision_parts_and_statistics_beside_a_model_are_left_alone(run, q8_gguf, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(q8_gguf, folder / "model-Q8_0.gguf")
    for name in ("mmproj-F16.gguf", "imatrix.gguf", "my-lora.gguf"):
        (folder / name).write_bytes(b"GGUF")
    inputs = recognise([folder])
    assert inputs.gguf == folder / "model-Q8_0.gguf"
    assert "imatrix.gguf, mmproj-F16.gguf, my-lora.gguf left alone" in inputs.notes[0]
    shutil.copy(q8_gguf, folder / "model-Q4_0.gguf")
    refuse(run, folder, tmp_path, UsageError, "several GGUF models", "name one, for example")


@pytest.mark.parametrize(
    ("kind", "architecture", "words"),
    [
        ("adapter", "qwen3moe", "adapter (LoRA)"),
        ("mmproj", "clip", "vision"),
        (None, "qwen3moe", "vocabulary only"),
    ],
)
def test_gguf_files_that_are_no_models(run, tmp_path, kind, architecture, words):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
        writer.add_tensor("blk.0.x", np.zeros(32, np.float32))
    else:
        writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(run, path, tmp_path, FormatError if kind is None else UnsupportedModelError, words)


# ---- resized vocabularies and quantised checkpoints --------------------------------------------------------


def test_a_resized_vocabulary_says_what_to_set(run, copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    rows = config["vocab_size"]
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 36}))
    parts = ("vocabulary was resized", f"got {rows} rows", f"limit {rows + 36}", f"set vocab_size to {rows}")
    refuse(run, copy, tmp_path, FormatError, "model.embed_tokens.weight", *parts)


def test_an_output_head_of_another_size(run, model, model_class, tmp_path):
    weights = {
        **model.weights,
        "lm_head.weight": np.ones((model.shape.vocab + 4, model.shape.hidden), np.float32),
    }
    wide = model_class(model.shape, 0, weights)
    refuse(
        run, wide.write_hf(tmp_path / "hf"), tmp_path, FormatError, "lm_head.weight", "vocabulary was resized"
    )
    refuse(
        run,
        wide.write_gguf(tmp_path / "m.gguf"),
        tmp_path,
        FormatError,
        "output.weight",
        "do not fit each other",
    )


def test_weights_of_formats_that_are_not_read(run, copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    exl3 = {"quant_method": "exl3", "bits": 4.0}
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": exl3}))
    refuse(run, copy, tmp_path, UnsupportedModelError, "quantised (EXL3, 4.0 bits)", "BF16 checkpoint")
    (copy / "config.json").write_text(json.dumps(config))
    path = copy / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype": "BF16"', b'"dtype": "I16" ', 1))
    refuse(run, copy, tmp_path, FormatError, "unsupported weight type", "BF16 checkpoint")
    (copy / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4_SVD"}}')
    refuse(run, copy, tmp_path, UnsupportedModelError, "quantised (NVIDIA ModelOpt, NVFP4_SVD)")


def test_more_tokens_than_rows(run, model, q8_gguf, tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for field in gguf.GGUFReader(q8_gguf).fields.values():
        if field.name.startswith("qwen3moe."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    writer.add_token_list([f"t{i}" for i in range(model.shape.vocab + 1)])
    writer.add_tensor("token_embd.weight", np.zeros((model.shape.vocab, model.shape.hidden), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(
        run,
        path,
        tmp_path,
        FormatError,
        f"got {model.shape.vocab + 1} tokens; limit {model.shape.vocab} rows",
    )


def test_files_of_a_bundle(run, bundle, tmp_path):
    refuse(run, bundle.path / "manifest.json", tmp_path, UsageError, "a Krasis bundle already")
    refuse(run, bundle.path / "gpu-000.safetensors", tmp_path, UsageError, "a file of a Krasis bundle")


# ---- several names of one model ----------------------------------------------------------------------------


def test_one_shard_or_all_of_them_mean_the_checkpoint(hf_dir):
    shards = sorted(hf_dir.glob("*.safetensors"))
    assert len(shards) == 2
    for given in (shards[:1], shards[1:], shards, [*shards, *shards]):
        assert recognise(given).hf == hf_dir


def test_all_parts_of_a_split_gguf_mean_one_model(model, hf_dir, tmp_path):
    first = model.write_gguf(tmp_path / "split" / "m.gguf", split=8)
    parts = sorted(first.parent.glob("*.gguf"))
    assert len(parts) > 2
    assert recognise(parts).gguf == first
    assert recognise([hf_dir, *reversed(parts)]) == recognise([hf_dir, first])


def test_all_pieces_of_a_cut_file_are_told_as_such(q8_gguf, tmp_path):
    data = q8_gguf.read_bytes()
    pieces = [tmp_path / f"m.gguf.part{number}of3" for number in (1, 2, 3)]
    for number, piece in enumerate(pieces):
        piece.write_bytes(data[number::3])
    with pytest.raises(FormatError, match="3 raw pieces"):
        recognise(pieces)


def test_a_folder_that_must_not_be_written_is_known_before_the_work(run, hf_dir, tmp_path, monkeypatch):
    from krasis.convert import resources

    monkeypatch.setattr(resources.os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="nothing can be written into the folder"):
        run([hf_dir], tmp_path / "m.krasis", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
