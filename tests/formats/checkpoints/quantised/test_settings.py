"""Settings of quantised checkpoints: what is understood, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from krasis.formats.checkpoints.quantised.fp4 import Fp4Reader
from krasis.formats.checkpoints.quantised.fp8 import BytesReader
from krasis.formats.checkpoints.quantised.gptq import GptqReader
from krasis.formats.checkpoints.quantised.kept import NO_CODES, WHOLE_ROWS, KeptCodes
from krasis.formats.checkpoints.quantised.packed_int import PackedReader, PackedScheme
from krasis.formats.checkpoints.quantised.registry import quantisation_beside, quantisation_of
from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError


def compressed(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, **more}


def group(num_bits: int = 4, kind: str = "int", form: str | None = None, **weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "format": form, "weights": {"num_bits": num_bits, "type": kind, **weights}}


KIMI = compressed(
    group(group_size=32, strategy="group", symmetric=True),
    format="pack-quantized",
    ignore=["lm_head", "re:.*self_attn.*"],
)
UNDERSTOOD: list[tuple[dict[str, Any], str, Any]] = [
    (
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
        },
        "FP8",
        BytesReader(((128, 128), (1, 32))),
    ),
    ({"quant_method": "FP8"}, "FP8", BytesReader(((1, 32),))),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "FP8", BytesReader(((1, 32),))),
    (KIMI, "compressed-tensors, INT4", PackedReader((PackedScheme(4, 32),))),
    (
        compressed(
            group(8, "float", "float-quantized", strategy="channel"),
            group(4, "int", "pack-quantized", group_size=128, strategy="group"),
            {"targets": ["Linear"], "weights": None, "input_activations": {"num_bits": 8}},
            format="mixed-precision",
        ),
        "compressed-tensors, FP8, INT4",
        PackedReader((PackedScheme(4, 128),)),
    ),
    (compressed(group(4, "float", group_size=16), format="nvfp4-pack-quantized"), "FP4", Fp4Reader()),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVIDIA ModelOpt, NVFP4", Fp4Reader()),
    (
        {
            "quant_method": "modelopt",
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "a": {"quant_algo": "FP8"},
                    "b": {"quant_algo": "NVFP4", "group_size": 16},
                },
            },
        },
        "MIXED_PRECISION, FP8, NVFP4",
        Fp4Reader(),
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ", GptqReader(128, zeros_less_one=True)),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
        "GPTQ",
        GptqReader(None, zeros_less_one=False),
    ),
    (
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "packing_format": "auto_round:auto_gptq",
        },
        "GPTQ",
        GptqReader(128, zeros_less_one=True),
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
        "GPTQ",
        GptqReader(128, zeros_less_one=True, ordered=True),
    ),
    (
        compressed(
            group(4, "int", group_size=32, symmetric=False, actorder="group"), format="pack-quantized"
        ),
        "INT4",
        PackedReader((PackedScheme(4, 32, symmetric=False, ordered=True),)),
    ),
    (
        compressed(group(8, "int", strategy="channel", symmetric=False), format="int-quantized"),
        "INT8",
        BytesReader((), integers=True, asymmetric=True),
    ),
]


@pytest.mark.parametrize(("settings", "name", "reader"), UNDERSTOOD)
def test_what_is_understood(settings: dict[str, Any], name: str, reader: Any) -> None:
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        found = quantisation_of(config, "config.json")
        assert found is not None
        assert name in found.name
        assert reader in found.readers


def test_a_cache_alone_leaves_the_weights_plain() -> None:
    settings = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    found = quantisation_of({"quantization_config": settings}, "config.json")
    assert found is not None
    assert found.name == "NVIDIA ModelOpt"


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "'e5m2'", "e4m3"]),
    ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size", "two sizes"]),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, ["weight_block_size", "two sizes"]),
    ({"quant_method": "fp8", "weight_block_size": [True, 1 << 70]}, ["weight_block_size", "two sizes"]),
    ({"quant_method": "gptq", "bits": 3}, ["bits", "got 3", "2, 4, 8"]),
    ({"quant_method": "gptq", "bits": "4"}, ["bits", "got '4'", "2, 4, 8"]),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["checkpoint_format", "'marlin'"]),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, ["is_marlin_format"]),
    ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, ["pack_dtype", "int32"]),
    ({"quant_method": "gptq", "bits": 4, "group_size": 1 << 60}, ["group_size", "out of range"]),
    ({"quant_method": "awq", "bits": 8}, ["bits", "got 8", "limit 4"]),
    ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, ["version", "'gemv'", "gemm"]),
    (
        {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"},
        ["packing_format", "exllamav2"],
    ),
    ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, ["quant_algo", "'INT4_AWQ'", "NVFP4"]),
    ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, ["quant_algo"]),
    (compressed(group(3), format="pack-quantized"), ["group_0: weights: num_bits", "got 3", "2, 4, 8"]),
    (compressed(group(6, "float"), format="mxfp6-pack-quantized"), ["format", "mxfp6"]),
    (compressed(group(4, "float", "marlin-24")), ["group_0: format", "marlin-24"]),
    (compressed(group(8, strategy="token"), format="int-quantized"), ["strategy", "'token'"]),
    (compressed(group(8, "complex"), format="int-quantized"), ["type", "'complex'"]),
    (compressed(sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config: format", "dense"]),
    (
        compressed(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        ["transform_config", "rotations"],
    ),
    (compressed() | {"config_groups": ["x"]}, ["config_groups", "must be an object"]),
]


@pytest.mark.parametrize(("settings", "parts"), REFUSED)
def test_what_is_refused_is_named(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(KrasisError) as caught:
        quantisation_of({"quantization_config": settings}, "/models/Qwen3-30B-A3B-GPTQ/config.json")
    sentence = str(caught.value)
    assert isinstance(caught.value, UnsupportedModelError | FormatError)
    assert all(part in sentence for part in parts), sentence
    assert sentence.isprintable()
    if "quantised in a way" in sentence:
        assert "probably 'Qwen3-30B-A3B'" in sentence


@pytest.mark.parametrize(
    ("file", "value", "name"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVIDIA ModelOpt, NVFP4"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "GPTQ"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "AWQ"),
    ],
)
def test_files_beside_a_silent_config(tmp_path: Path, file: str, value: dict[str, Any], name: str) -> None:
    assert quantisation_beside(tmp_path) is None
    (tmp_path / file).write_text(json.dumps(value))
    found = quantisation_beside(tmp_path)
    assert found is not None
    assert found.name == name
    (tmp_path / file).write_text("{")
    assert quantisation_beside(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, KeptCodes(group=128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}, KeptCodes(group=WHOLE_ROWS)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True}, NO_CODES),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}, NO_CODES),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, KeptCodes(group=64)),
        ({"quant_method": "mxfp4"}, KeptCodes(mxfp4=True)),
        (compressed(group(4, "int", group_size=32), format="pack-quantized"), KeptCodes(group=32)),
        (
            compressed(
                group(4, "int", group_size=32), group(4, "int", group_size=64), format="pack-quantized"
            ),
            NO_CODES,
        ),
        (compressed(group(4, "int", group_size=32, symmetric=False), format="pack-quantized"), NO_CODES),
        # Nothing hangs on these but a choice, so that odd ones are no reason to refuse a checkpoint.
        *(
            ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": odd}, NO_CODES)
            for odd in ("yes", 1, [], None, {"a": 1})
        ),
        *(
            ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": odd}, NO_CODES)
            for odd in ("no", 0, None)
        ),
    ],
)
def test_what_bundles_keep(settings: dict[str, Any], kept: KeptCodes) -> None:
    found = quantisation_of({"quantization_config": settings}, "config.json")
    assert found is not None
    assert found.kept == kept
