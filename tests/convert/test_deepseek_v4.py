"""DeepSeek-V4's checkpoints: the hub's names and those that transformers writes, FP4 experts among FP8,
tables of expert numbers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from quantised_checkpoints import Tensors, write_file
from twin_quantisers import Quantised, e4m3, mxfp4

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.runtime.cpu.weights import load_weights
from tests.support.tiny_checkpoints import tiny

FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "shared_experts.w1", "shared_experts.w2", "shared_experts.w3")
SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("deepseek_v4", tmp_path_factory.mktemp("original") / "hf", num_hidden_layers=5)


def tensors_of(folder: Path) -> Tensors:
    checkpoint = ShardedCheckpoint.open(folder)
    return {name: (info.dtype, np.array(checkpoint.array(name))) for name, info in checkpoint.tensors.items()}


def hub_name(name: str) -> str:
    """The hub's name of what transformers writes under another."""
    for theirs, hub in (
        ("attn.norm.weight", "attn.kv_norm.weight"),
        ("model.hc_head.hc_", "hc_head_"),
        ("model.embed_tokens.", "embed."),
        ("model.", ""),
    ):
        name = name.replace(theirs, hub)
    return name


def folder_of(source: Path, folder: Path, tensors: Tensors, **more: object) -> Path:
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text("utf-8")) | more
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_file(folder / "model.safetensors", tensors)
    return folder


def run(folder: Path, *options: str) -> Result:
    out = folder.with_suffix(".krasis")
    fixed = ["-o", str(out), "--gpu-group", "64", "--force-text", "--threads", "1"]
    return CliRunner().invoke(convert, [str(folder), *fixed, *options], catch_exceptions=False)


def shards(folder: Path) -> dict[str, bytes]:
    done = run(folder, "--tiers", "gpu")
    assert done.exit_code == 0, done.output
    return {path.name: path.read_bytes() for path in folder.with_suffix(".krasis").glob("*.safetensors")}


def in_blocks(weight: np.ndarray) -> Quantised:
    """FP8 with one power of two for 128 x 128 weights."""
    n, k = weight.shape
    padded = np.zeros((-(-n // 128) * 128, -(-k // 128) * 128), np.float32)
    padded[:n, :k] = weight
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    exponents = np.ceil(np.log2(np.abs(blocks).max((1, 3)) / 448))
    spread = (2.0**exponents).astype(np.float32).repeat(128, 0).repeat(128, 1)[:n, :k]
    codes, values = e4m3(weight / spread)
    scales = (exponents + 127).astype(np.uint8)
    return Quantised({"weight": ("F8_E4M3", codes), "scale": ("F8_E8M0", scales)}, values * spread)


def test_the_hubs_names_are_those_of_transformers(original: Path, tmp_path: Path) -> None:
    theirs = folder_of(original, tmp_path / "theirs", tensors_of(original))
    renamed = {hub_name(name): one for name, one in tensors_of(original).items()}
    assert "layers.1.attn.kv_norm.weight" in renamed
    assert shards(theirs) == shards(folder_of(original, tmp_path / "hub", renamed))


def test_fp4_experts_among_fp8(original: Path, tmp_path: Path) -> None:
    """As the hub has them, with a layer that drafts; to the bytes of the values that they stand for."""
    native: Tensors = {"mtp.0.e_proj.weight": ("F32", np.zeros((2, 2), np.float32))}
    plain: Tensors = {}
    for theirs, (dtype, bits) in tensors_of(original).items():
        name = hub_name(theirs)
        root = name.removesuffix("weight")
        is_expert = ".experts." in name
        if not is_expert and not root.endswith(tuple(f".{part}." for part in FP8)):
            native[name] = plain[name] = (dtype, bits)
            continue
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        one = mxfp4(values, ("weight", "scale")) if is_expert else in_blocks(values)
        native |= {
            f"{root}{part}": ("I8" if part == "weight" else "F8_E8M0", found[1]) if is_expert else found
            for part, found in one.tensors.items()
        }
        plain[name] = ("F32", one.values)
    folder = folder_of(
        original, tmp_path / "native", native, quantization_config=SETTINGS, expert_dtype="fp4"
    )
    assert shards(folder) == shards(folder_of(original, tmp_path / "plain", plain))


def test_the_table_is_kept_as_it_is(original: Path, tmp_path: Path) -> None:
    folder = folder_of(original, tmp_path / "a", tensors_of(original))
    assert run(folder).exit_code == 0
    with Bundle.open(folder.with_suffix(".krasis")) as bundle:
        found = load_weights(bundle, "cpu").layers[1].table("experts.router.table", 8)
        np.testing.assert_array_equal(found, tensors_of(original)["model.layers.1.ffn.gate.tid2eid"][1])


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda table: np.where(table == 3, 8, table), r"an expert that the layer does not have .*got 8"),
        (lambda table: np.where(table == 3, -1, table), r"an expert that the layer does not have .*got -1"),
        (lambda table: table[:, :1].repeat(2, 1), "the same expert twice"),
        (lambda table: table.astype(np.float32), "holds no whole numbers .*got F32"),
    ],
    ids=["too large", "negative", "twice", "floats"],
)
def test_a_table_of_other_numbers_is_refused(
    original: Path, tmp_path: Path, edit: Callable[[np.ndarray], np.ndarray], sentence: str
) -> None:
    tensors = tensors_of(original)
    name = "model.layers.1.ffn.gate.tid2eid"
    table = edit(tensors[name][1])
    tensors[name] = ("F32" if table.dtype == np.float32 else "I64", table)
    done = run(folder_of(original, tmp_path / "a", tensors))
    assert done.exit_code == 3
    assert name in done.output
    assert re.search(sentence, done.output), done.output
