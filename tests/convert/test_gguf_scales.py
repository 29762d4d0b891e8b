"""GGUFs of NVFP4 as llama.cpp makes them of ModelOpt's: a scale for each matrix lies beside its blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from krasis.convert.cli import main as convert
from tests.support.tiny_checkpoints import tiny
from tests.support.tiny_ggufs import tiny_gguf

NVFP4 = gguf.GGMLQuantizationType.NVFP4
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    source = tiny("qwen3_moe", folder / "hf", num_hidden_layers=1, num_experts=4)
    return tiny_gguf(source, folder / "plain.gguf")


def rewritten(plain: Path, path: Path, tensors: Tensors) -> Path:
    """A GGUF with the metadata of another."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for field in gguf.GGUFReader(plain).fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], kind)
    for name, (values, dtype) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scaled(plain: Path) -> tuple[Tensors, Tensors]:
    """(blocks with scales, their values in F32)."""
    rng = np.random.default_rng(5)
    f32 = gguf.GGMLQuantizationType.F32
    blocks: Tensors = {}
    values: Tensors = {}
    for tensor in gguf.GGUFReader(plain).tensors:
        data = np.array(tensor.data)
        if not ("_exps" in tensor.name or "attn_q.weight" in tensor.name):
            blocks[tensor.name] = values[tensor.name] = (data, f32)
            continue
        raw = random_blocks(rng, data.shape)
        scales = rng.uniform(0.02, 0.03, data.shape[0] if data.ndim == 3 else 1).astype(np.float32)
        root = tensor.name.removesuffix("weight")
        blocks[tensor.name] = raw, NVFP4
        blocks[f"{root}scale"] = scales, f32
        blocks[f"{root}input_scale"] = np.ones_like(scales), f32
        whole = gguf.quants.dequantize(raw, NVFP4).reshape(data.shape)
        values[tensor.name] = whole * scales.reshape(-1, *[1] * (data.ndim - 1)), f32
    return blocks, values


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Four E4M3 scales of about 1, then 64 codes; the gguf package does not quantise to them."""
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 64, 36), dtype=np.uint8)
    blocks[..., :4] = rng.integers(0x30, 0x40, blocks[..., :4].shape)
    return blocks.reshape(*shape[:-1], -1)


def run(source: Path, out: Path) -> Result:
    options = ["--gpu-group", "64", "--force-text", "--threads", "1", "--quiet"]
    return CliRunner().invoke(convert, [str(source), "-o", str(out), *options], catch_exceptions=False)


def test_weights_are_multiplied_by_their_scale(plain: Path, tmp_path: Path) -> None:
    found = []
    for number, tensors in enumerate(scaled(plain)):
        out = tmp_path / f"{number}.krasis"
        done = run(rewritten(plain, tmp_path / f"{number}.gguf", tensors), out)
        assert done.exit_code == 0, done.output
        found.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (np.ones(3, np.float32), ["one number a matrix", "[3]"]),
        (np.array([1, np.nan, 1, 1], np.float32), ["NaN or infinity", "ffn_down_exps.scale"]),
        (np.ones(4, np.float16), ["F16", "F32", "ffn_down_exps.scale"]),
    ],
)
def test_scales_that_do_not_fit(plain: Path, tmp_path: Path, scale: np.ndarray, words: list[str]) -> None:
    tensors, _ = scaled(plain)
    kind = gguf.GGMLQuantizationType[{"float32": "F32", "float16": "F16"}[scale.dtype.name]]
    tensors["blk.0.ffn_down_exps.scale"] = scale, kind
    done = run(rewritten(plain, tmp_path / "m.gguf", tensors), tmp_path / "m.krasis")
    assert done.exit_code == 3
    assert all(word in done.output for word in words), done.output


def test_types_that_nothing_decodes_are_named(plain: Path, tmp_path: Path) -> None:
    tensors = {
        tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(plain).tensors
    }
    shape = tensors["blk.0.ffn_down_exps.weight"][0].shape
    kind = gguf.GGMLQuantizationType.Q8_1
    raw = np.ones((shape[0], shape[1], shape[2] // 32 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    tensors["blk.0.ffn_down_exps.weight"] = raw, kind
    done = run(rewritten(plain, tmp_path / "m.gguf", tensors), tmp_path / "m.krasis")
    assert done.exit_code == 3
    assert "tensors of type Q8_1 hold no weights, or nothing here decodes them" in done.output
    assert "Q8_0 is kept without loss" in done.output
