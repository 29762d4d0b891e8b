"""Quantised checkpoints in the shapes that they come in, to the bundle of what their weights stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from quantised_checkpoints import Tensors, quantise, write_file
from twin_quantisers import SCHEMES, Quantised, Scheme, compressed_tensors, fp8, gptq, packed_int

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.runtime.cpu.weights import load_weights
from tests.support.tiny_checkpoints import tiny
from tests.support.tiny_ggufs import tiny_gguf

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(\w+)")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "hf"
    return tiny("qwen3_moe", folder, num_hidden_layers=1, num_experts=4, moe_intermediate_size=128)


def run(*inputs: Path, out: Path, options: tuple[str, ...] = ()) -> Result:
    fixed = ["--gpu-group", "64", "--force-text", "--threads", "1", *options]
    return CliRunner().invoke(convert, [*map(str, inputs), "-o", str(out), *fixed], catch_exceptions=False)


def shards(folder: Path, *more: Path) -> dict[str, bytes]:
    """Every byte of its bundle. Of the CPU's experts only a GGUF's: a checkpoint's may keep more than those
    of the plain twin. Groups of 64 keep no code.
    """
    out = folder.with_suffix(".krasis")
    done = run(folder, *more, out=out, options=() if more else ("--tiers", "gpu"))
    assert done.exit_code == 0, done.output
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def tensors_of(folder: Path) -> Tensors:
    checkpoint = ShardedCheckpoint.open(folder)
    types = {"F8_E4M3": "U8", "F8_E8M0": "U8"}
    return {
        name: (
            info.dtype,
            np.array(checkpoint.view(name)).reshape(*info.shape, -1)
            if info.dtype in types
            else np.array(checkpoint.array(name)),
        )
        for name, info in checkpoint.tensors.items()
    }


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = {
        name: (dtype, one.reshape(one.shape[:-1]) if dtype.startswith("F8") else one)
        for name, (dtype, one) in tensors_of(folder).items()
    }
    edit(tensors)
    write_file(folder / "model.safetensors", tensors)


def fuse(names: dict[str, str]) -> Callable[[Tensors], None]:
    """All experts in one tensor, gate and up joined. names: what is appended instead of each part's name."""

    def edit(tensors: Tensors) -> None:
        found: dict[str, dict[tuple[int, str], tuple[str, Any]]] = {}
        for name in [name for name in tensors if EXPERT.fullmatch(name)]:
            match = EXPERT.fullmatch(name)
            assert match is not None
            root, number, part, what = match.groups()
            one = tensors.pop(name)
            if what in names:
                joined = "down_proj" if part == "down" else "gate_up_proj"
                key = f"{root}.{joined}{names[what]}"
                found.setdefault(key, {})[int(number), part] = one
        for name, parts in found.items():
            dtype = next(iter(parts.values()))[0]
            order = ("down",) if ".down_proj" in name else ("gate", "up")
            experts = [np.concatenate([parts[e, part][1] for part in order]) for e in range(4)]
            tensors[name] = dtype, np.stack(experts)

    return edit


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("fp8", {"weight": "", "weight_scale_inv": "_scale_inv"}),
        ("fp8_channel", {"weight": "", "weight_scale": "_scale"}),
        ("int4", {"weight_packed": "_packed", "weight_scale": "_scale"}),
        ("mxfp4", {"weight_packed": "_packed", "weight_scale": "_scale"}),
    ],
)
def test_experts_in_one_tensor(original: Path, tmp_path: Path, scheme: str, names: dict[str, str]) -> None:
    quantised, plain = quantise(original, tmp_path, SCHEMES[scheme])
    change(quantised, fuse(names))
    assert any("gate_up_proj" in name for name in ShardedCheckpoint.open(quantised).tensors)
    assert shards(quantised) == shards(plain)


def test_transposed_experts_in_one_tensor(tmp_path: Path) -> None:
    """[experts, k, n], as the hub has Qwen3-VL-MoE, in blocks that are cut at the edges."""
    source = tiny("qwen3_vl_moe", tmp_path / "hf", num_hidden_layers=1, num_experts=4)

    def write(weight: np.ndarray) -> Quantised:
        each = [fp8(one, 128, 128, "weight_scale_inv") for one in weight]
        stacked = {
            part: (dtype, np.stack([one.tensors[part][1] for one in each]))
            for part, (dtype, _) in each[0].tensors.items()
        }
        names = {"weight": "", "weight_scale_inv": "_scale_inv"}
        return Quantised(
            {names[part]: one for part, one in stacked.items()}, np.stack([one.values for one in each])
        )

    scheme = Scheme(SCHEMES["fp8"].settings, write)
    quantised, plain = quantise(source, tmp_path, scheme, lambda name: ".experts." in name)
    assert shards(quantised) == shards(plain)


def test_keys_and_values_of_latents(tmp_path: Path) -> None:
    """kv_b_proj holds both, head by head; keys are turned. As DeepSeek releases its models."""
    source = tiny("deepseek_v3", tmp_path / "hf")
    quantised, plain = quantise(source, tmp_path, SCHEMES["fp8"])
    assert "model.layers.0.self_attn.kv_b_proj.weight_scale_inv" in ShardedCheckpoint.open(quantised).tensors
    assert shards(quantised) == shards(plain)


@pytest.mark.parametrize("scheme", ["fp8", "int4", "awq"])
def test_beside_a_gguf_of_the_same_model(original: Path, tmp_path: Path, scheme: str) -> None:
    quantised, plain = quantise(original, tmp_path, SCHEMES[scheme])
    gguf = tiny_gguf(original, tmp_path / "q8.gguf", experts="Q8_0")
    found, expected, theirs = shards(quantised, gguf), shards(plain), shards(original, gguf)
    assert {name for name in found if name.startswith("cpu")}
    for name, data in found.items():
        assert data == (theirs if name.startswith("cpu") else expected)[name], name


def test_a_gguf_of_another_model_is_noticed(original: Path, tmp_path: Path) -> None:
    other = tiny(
        "qwen3_moe", tmp_path / "b", seed=1, num_hidden_layers=1, num_experts=4, moe_intermediate_size=128
    )
    quantised, _ = quantise(original, tmp_path, SCHEMES["int4"])
    done = run(quantised, tiny_gguf(other, tmp_path / "q8.gguf", experts="Q8_0"), out=tmp_path / "m.krasis")
    assert done.exit_code == 5
    assert "another model or version" in done.output


def test_a_tied_head_that_is_there_quantised_too(original: Path, tmp_path: Path) -> None:
    """The same codes are the same matrix; what lies beside it under its name is left alone."""
    quantised, plain = quantise(original, tmp_path, SCHEMES["int4"], lambda name: "embed_tokens" in name)
    parts = ("weight_packed", "weight_scale", "weight_shape")

    def tie(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight")
        tensors |= {f"lm_head.{part}": tensors[f"model.embed_tokens.{part}"] for part in parts}

    change(quantised, tie)
    change(plain, lambda tensors: tensors.pop("lm_head.weight"))
    for folder in (quantised, plain):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert shards(quantised) == shards(plain)


def test_biases_of_zeros(original: Path, tmp_path: Path) -> None:
    """Some quantisers give every matrix a bias; one that is not zero would be dropped, so it is refused."""
    quantised, plain = quantise(original, tmp_path, SCHEMES["gptq"])
    name = "model.layers.0.self_attn.o_proj.bias"

    def add(value: float) -> Callable[[Tensors], None]:
        return lambda tensors: tensors.update({name: ("F16", np.full(128, value, np.float16))})

    change(quantised, add(0.0))
    assert shards(quantised) == shards(plain)
    change(quantised, add(0.5))
    done = run(quantised, out=tmp_path / "refused.krasis")
    assert done.exit_code == 4
    assert name in done.output


def test_it_is_said(original: Path, tmp_path: Path) -> None:
    quantised, plain = quantise(original, tmp_path, SCHEMES["modelopt"])
    done = run(quantised, out=tmp_path / "m.krasis", options=("--dry-run",))
    assert "the checkpoint is quantised (NVIDIA ModelOpt, NVFP4)" in done.output
    config = json.loads((plain / "config.json").read_text("utf-8"))
    config["quantization_config"] = SCHEMES["fp8"].settings
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run(plain, out=tmp_path / "m.krasis", options=("--dry-run",))
    assert done.exit_code == 0
    assert "quantised (FP8), but none of them is" in done.output


def test_settings_in_a_file_of_their_own(original: Path, tmp_path: Path) -> None:
    quantised, plain = quantise(original, tmp_path, SCHEMES["modelopt"])
    config = json.loads((quantised / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    side = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (quantised / "hf_quant_config.json").write_text(json.dumps(side), encoding="utf-8")
    assert shards(quantised) == shards(plain)


@pytest.mark.parametrize("scheme", ["fp8", "gptq"])
def test_other_scales_are_another_model(original: Path, tmp_path: Path, scheme: str) -> None:
    """What is there already is recognised by the contents of its sources, of which scales are a part."""
    quantised, _ = quantise(original, tmp_path, SCHEMES[scheme])
    out = tmp_path / "m.krasis"
    assert run(quantised, out=out).exit_code == 0
    assert run(quantised, out=out).exit_code == 0
    part = "weight_scale_inv" if scheme == "fp8" else "scales"

    def edit(tensors: Tensors) -> None:
        dtype, values = tensors[f"model.layers.0.mlp.experts.3.down_proj.{part}"]
        values.reshape(-1)[-1:] *= 2 if dtype != "BF16" else 1
        values.reshape(-1)[-1:] += 0x80 if dtype == "BF16" else 0

    change(quantised, edit)
    assert run(quantised, out=out).exit_code == 2


def test_codes_that_are_no_numbers(original: Path, tmp_path: Path) -> None:
    quantised, _ = quantise(original, tmp_path, SCHEMES["fp8"])
    name = "model.layers.0.mlp.experts.2.up_proj.weight"

    def edit(tensors: Tensors) -> None:
        tensors[name][1].reshape(-1)[1000] = 0x7F

    change(quantised, edit)
    done = run(quantised, out=tmp_path / "m.krasis")
    assert done.exit_code == 3
    assert name in done.output
    assert "NaN" in done.output


def test_a_stretch_of_zeros_is_damage(original: Path, tmp_path: Path) -> None:
    quantised, _ = quantise(original, tmp_path, SCHEMES["fp8"])

    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.experts.1.gate_proj.weight"][1].reshape(-1)[4000:12000] = 0

    change(quantised, edit)
    done = run(quantised, out=tmp_path / "m.krasis")
    assert done.exit_code == 3
    assert "gate_proj.weight', layer 0 expert 1: 8000 of 16384 weights, from 4000 on, are zero" in done.output


LOSSLESS = {
    "int4": SCHEMES["int4"],
    "int4_g128": Scheme(
        compressed_tensors("pack-quantized", 4, "int", "group", group_size=128),
        lambda weight: packed_int(weight, 128),
    ),
    "gptq": Scheme(
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        lambda weight: gptq(weight, 128, act_order=False),
    ),
    "awq": SCHEMES["awq"],
    "mxfp4": SCHEMES["mxfp4"],
}


@pytest.mark.parametrize("scheme", LOSSLESS)
def test_experts_of_whole_steps_lose_nothing_in_8_bits(original: Path, tmp_path: Path, scheme: str) -> None:
    quantised, plain = quantise(original, tmp_path, LOSSLESS[scheme])
    out = tmp_path / "m.krasis"
    assert run(quantised, out=out, options=("--tiers", "cpu", "--cpu-format", "q8")).exit_code == 0
    assert_experts(out, plain, "cpu")


def test_scales_that_float16_does_not_hold_are_rounded_again(original: Path, tmp_path: Path) -> None:
    def write(weight: np.ndarray) -> Quantised:
        written = packed_int(weight, 32)
        scales = (written.tensors["weight_scale"][1].astype(np.float32) * 1.0001).astype(np.float32)
        tensors = written.tensors | {"weight_scale": ("F32", scales)}
        return Quantised(tensors, written.values * np.float32(1.0001))

    quantised, plain = quantise(original, tmp_path, Scheme(SCHEMES["int4"].settings, write))
    found = []
    for folder in (quantised, plain):
        out = folder.with_suffix(".krasis")
        assert run(folder, out=out, options=("--tiers", "cpu", "--cpu-format", "q8")).exit_code == 0
        found.append((out / "cpu-000.safetensors").read_bytes())
    assert found[0] == found[1]


def assert_experts(bundle: Path, plain: Path, tier: str) -> None:
    """Every weight of the experts is the checkpoint's, bit for bit."""
    checkpoint = ShardedCheckpoint.open(plain)
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, tier)
        for number, record in enumerate(weights.layers[0].records()):
            parts = weights.expert_layout.unpack_expert(record, 128, 128)
            for part, values in zip(("gate", "up", "down"), parts, strict=True):
                name = f"model.layers.0.mlp.experts.{number}.{part}_proj.weight"
                np.testing.assert_array_equal(values, np.asarray(checkpoint.array(name)))
