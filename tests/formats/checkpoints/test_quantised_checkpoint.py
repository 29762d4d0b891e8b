"""Quantised checkpoints are refused by the name of their format, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from format_builders import hf_config, safetensors

from krasis.formats.architecture import from_hf_config
from krasis.formats.checkpoints.quantised_checkpoint import refuse_side_files
from krasis.formats.checkpoints.safetensors import SafetensorsFile
from krasis.formats.errors import FormatError, UnsupportedModelError


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"quant_method": "deepspeed_fp8"}, "FP8 (DeepSpeed)"),
        ({"quant_method": "quark", "export": {}}, "AMD Quark"),
        ({"quant_method": "hqq", "bits": 4, "group_size": 128}, "HQQ, 4 bits"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "exl3", "bits": 3.5}, "EXL3, 3.5 bits"),
        ({"quant_method": "new\x1b[2Jthing"}, "'new\\x1b[2Jthing'"),
        ({"quant_method": 7}, "in a format that its settings do not name"),
        ({"bits": 4}, "in a format that its settings do not name"),
        (["fp8"], "quantization_config list"),
        ("fp8", "quantization_config 'fp8'"),
    ],
)
def test_the_format_is_named_in_one_sentence(value: Any, name: str) -> None:
    config = hf_config(quantization_config=value)
    with pytest.raises(UnsupportedModelError) as caught:
        from_hf_config(config, "/models/Qwen3-235B-A22B-Instruct-2507-FP8/config.json")
    sentence = str(caught.value)
    assert f"config.json: quantization_config: the checkpoint is quantised ({name}" in sentence
    assert "BF16 checkpoint it was made from, probably 'Qwen3-235B-A22B-Instruct-2507'" in sentence
    assert "{" not in sentence
    assert sentence.isprintable()


def test_mlx_says_it_in_a_field_of_its_own() -> None:
    config = hf_config(quantization={"group_size": 64, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(MLX, 4 bits\)"):
        from_hf_config(config, "/m/x-4bit/config.json")


@pytest.mark.parametrize("value", [None, {}])
def test_nothing_said_is_nothing_refused(value: Any) -> None:
    from_hf_config(hf_config(quantization_config=value), "config.json")


@pytest.mark.parametrize("folder", ["Qwen3-30B-A3B", "fp8", "-fp8", ""])
def test_only_a_telling_name_gives_a_guess(folder: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        from_hf_config(hf_config(quantization_config={"quant_method": "hqq"}), f"/m/{folder}/config.json")
    assert "probably" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}', "NVIDIA ModelOpt, NVFP4"),
        ("quantize_config.json", '{"bits": 4}', "GPTQ"),
        ("quant_config.json", "not even JSON", "AWQ"),
    ],
)
def test_files_beside_a_silent_config(tmp_path: Path, file: str, text: str, name: str) -> None:
    refuse_side_files(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UnsupportedModelError, match=rf"{file}: the checkpoint is quantised \({name}\)"):
        refuse_side_files(tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ"])
def test_types_newer_than_the_reader_say_what_they_are(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(FormatError, match=r"unknown dtype.*BF16 checkpoint"):
        SafetensorsFile.open(path)
