"""Pairs of MXFP4 codes and scales that do not belong together: one sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from tests.support.tiny_mxfp4 import CONFIG, tiny_mxfp4

ROOT = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mxfp4(tmp_path_factory.mktemp("pairs") / "hf")


@pytest.fixture
def changed(sound: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """changed(change): a copy whose tensors went through change."""
    from safetensors.torch import load_file, save_file

    def build(change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / "hf"
        shutil.copytree(sound, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return build


def complaint(folder: Path) -> tuple[int, str]:
    """The exit code and what is said, of which one line is an error."""
    out = folder.with_name("out.krasis")
    done = CliRunner().invoke(convert, [str(folder), "-o", str(out), "--tiers", "cpu", "--force-text"])
    assert not out.exists() or done.exit_code == 0
    errors = [line for line in done.output.splitlines() if "error:" in line]
    assert len(errors) == (done.exit_code != 0)
    return done.exit_code, "".join(errors)


def without_scales(tensors: dict[str, Any]) -> None:
    del tensors[f"{ROOT}_scales"]


def without_codes(tensors: dict[str, Any]) -> None:
    del tensors[f"{ROOT}_blocks"]


def of_fewer_blocks(tensors: dict[str, Any]) -> None:
    tensors[f"{ROOT}_scales"] = tensors[f"{ROOT}_scales"][:, :, :-1].contiguous()


def of_half_blocks(tensors: dict[str, Any]) -> None:
    tensors[f"{ROOT}_blocks"] = tensors[f"{ROOT}_blocks"][..., :8].contiguous()


def of_fewer_experts(tensors: dict[str, Any]) -> None:
    for part in ("_blocks", "_scales"):
        tensors[ROOT + part] = tensors[ROOT + part][:-1].contiguous()


def in_floats(tensors: dict[str, Any]) -> None:
    tensors[f"{ROOT}_scales"] = tensors[f"{ROOT}_scales"].float()


def flat(tensors: dict[str, Any]) -> None:
    tensors[f"{ROOT}_blocks"] = tensors[f"{ROOT}_blocks"].flatten(2)


def twice(tensors: dict[str, Any]) -> None:
    tensors[ROOT] = tensors["model.layers.1.mlp.experts.down_proj_bias"].clone()


def with_nan(tensors: dict[str, Any]) -> None:
    tensors[f"{ROOT}_scales"][3, 5, 1] = 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scales, f"tensor '{ROOT}_scales' is missing"),
        (without_codes, f"tensor '{ROOT.replace('down_proj', '0.down_proj')}.weight' is missing"),
        (of_fewer_blocks, "MXFP4 codes and scales do not fit (got [8, 192, 2, 16] and [8, 192, 1]"),
        (of_half_blocks, "MXFP4 codes and scales do not fit (got [8, 192, 2, 8]"),
        (of_fewer_experts, "wrong shape (got [7, 192, 64]; limit [8, 192, 64])"),
        (in_floats, "MXFP4 codes and scales are bytes (got U8, F32)"),
        (flat, "MXFP4 codes and scales do not fit (got [8, 192, 32]"),
        (twice, f"'{ROOT}' is there as codes and scales, and in another form too"),
        (with_nan, "scale of an MXFP4 block is NaN, or beyond what float32 holds (got exponent 255 in row 5"),
    ],
)
def test_what_does_not_fit(changed: Any, change: Callable[[dict[str, Any]], None], words: str) -> None:
    code, said = complaint(changed(change))
    assert code == 3, said
    assert words in said
    assert ROOT in said or change is without_codes


def test_the_field_alone_does_not_make_them_pairs(sound: Path, tmp_path: Path) -> None:
    """Copies in floats keep it now and then; in other families it means another format."""
    folder = tmp_path / "copy"
    shutil.copytree(sound.with_name("hf-bf16"), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    assert complaint(folder) == (0, "")
    shutil.rmtree(tmp_path / "out.krasis")
    config = json.loads((sound / "config.json").read_text("utf-8"))
    other = config | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}
    other |= {
        "moe_intermediate_size": 64,
        "layer_types": None,
        "sliding_window": None,
        "attention_bias": False,
    }
    other["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(other))
    code, said = complaint(folder)
    assert code == 3, said
    assert "is missing" in said
