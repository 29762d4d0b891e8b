"""Experts that have 4 bits already keep their codes and scales, in formats that are chosen by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from quantised_checkpoints import quantise
from twin_quantisers import (
    SCHEMES,
    Array,
    Quantised,
    Scheme,
    compressed_tensors,
    gptq_symmetric,
    packed_int,
    words,
)

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.runtime.cpu.weights import load_weights
from tests.support.tiny_checkpoints import tiny
from tests.support.tiny_ggufs import tiny_gguf

NAMES = ("gate", "up", "down")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "hf"
    return tiny("qwen3_moe", folder, num_hidden_layers=1, num_experts=4, moe_intermediate_size=128)


def wide(weight: Array, group: int) -> Quantised:
    """Scales three times too large, as a search for outliers may leave them: codes of -3..3."""
    return packed_int(weight, group, stretch=3)


def int4(group: int, write: Callable[[Array, int], Quantised] = packed_int) -> Scheme:
    settings = compressed_tensors("pack-quantized", 4, "int", "group", group_size=group)
    return Scheme(settings, lambda weight: write(weight, group))


def gptq(group: int, **settings: bool) -> Scheme:
    said = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True} | settings
    return Scheme(said, lambda weight: gptq_symmetric(weight, group))


SYMMETRIC_AWQ = Scheme(
    {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": False},
    lambda weight: gptq_symmetric(weight, 64, form="awq"),
)


ORDERED = Scheme(SCHEMES["gptq"].settings | {"sym": True}, SCHEMES["gptq"].write)


def converted(source: Path, *options: str) -> tuple[Path, str]:
    out = source.with_suffix(".krasis")
    arguments = [str(source), "-o", str(out), "--force-text", "--threads", "1", *options]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out, done.output


def layouts(bundle: Path) -> tuple[str, str]:
    """(of the GPU, of the CPU)."""
    with Bundle.open(bundle) as opened:
        return opened.manifest.layouts["gpu"], opened.manifest.layouts["cpu"]


def unpacked(bundle: Path, tier: str) -> dict[str, np.ndarray]:
    """The experts' weights by the hub's names."""
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, tier)
        return {
            f"model.layers.0.mlp.experts.{number}.{part}_proj.weight": values
            for number, record in enumerate(weights.layers[0].records())
            for part, values in zip(NAMES, weights.expert_layout.unpack_expert(record, 128, 128), strict=True)
        }


def assert_kept(bundle: Path, plain: Path, *tiers: str) -> None:
    """Every weight is the checkpoint's, bit for bit."""
    checkpoint = ShardedCheckpoint.open(plain)
    for tier in tiers:
        for name, values in unpacked(bundle, tier).items():
            np.testing.assert_array_equal(values, np.asarray(checkpoint.array(name)), name)


@pytest.mark.parametrize(
    ("scheme", "gpu", "cpu"),
    [
        (int4(32), "marlin-u4b8-g32-f16", "cpu-i4-r32-b32"),
        (int4(32, wide), "marlin-u4b8-g32-f16", "cpu-i4-r32-b32"),
        (int4(128, wide), "marlin-u4b8-g128-f16", "cpu-i4-r32-b32"),
        (gptq(64), "marlin-u4b8-g64-f16", "cpu-i4-r32-b32"),
        (SYMMETRIC_AWQ, "marlin-u4b8-g64-f16", "cpu-i4-r32-b32"),
    ],
    ids=["int4", "wide", "g128", "gptq", "awq"],
)
def test_symmetric_codes(original: Path, tmp_path: Path, scheme: Scheme, gpu: str, cpu: str) -> None:
    quantised, plain = quantise(original, tmp_path, scheme)
    bundle, said = converted(quantised, "--gpu-scales", "f16")
    assert layouts(bundle) == (gpu, cpu)
    assert "the GPU experts keep the source's 4-bit codes, with scales in f16" in said
    assert "experts keep their codes and scales on the CPU" in said
    assert_kept(bundle, plain, "gpu", "cpu")


def test_microscaled_codes(original: Path, tmp_path: Path) -> None:
    """MXFP4 as compressed-tensors has it, in a model whose family was not released so."""
    quantised, plain = quantise(original, tmp_path, SCHEMES["mxfp4"])
    bundle, said = converted(quantised)
    assert layouts(bundle) == ("marlin-e2m1-g32-e8m0", "cpu-mxfp4-r32-b32")
    assert "MXFP4 experts are kept as they are, without loss" in said
    assert_kept(bundle, plain, "gpu", "cpu")


def test_a_gguf_of_q4_0(original: Path, tmp_path: Path) -> None:
    source = tiny_gguf(original, tmp_path / "q4.gguf", experts="Q4_0")
    bundle, said = converted(source, "--gpu-scales", "f16")
    assert layouts(bundle) == ("marlin-u4b8-g32-f16", "cpu-i4-r32-b32")
    assert "the GGUF's Q4_0 experts are kept as they are" in said
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for tier in ("gpu", "cpu"):
        for name, values in unpacked(bundle, tier).items():
            _, _, _, _, _, number, part, _ = name.split(".")
            tensor = held[f"blk.0.ffn_{part.removesuffix('_proj')}_exps.weight"]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[int(number)]
            np.testing.assert_array_equal(values, expected, name)


@pytest.mark.parametrize(
    "scheme",
    [SCHEMES["gptq"], SCHEMES["awq"], SCHEMES["fp8"], gptq(64, sym=False), ORDERED],
    ids=["ordered", "zeros", "fp8", "unsaid", "ordered by name"],
)
def test_others_have_the_usual_formats(original: Path, tmp_path: Path, scheme: Scheme) -> None:
    quantised, _ = quantise(original, tmp_path, scheme)
    bundle, said = converted(quantised)
    assert layouts(bundle) == ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32")
    assert "keep" not in said.partition("relative squared")[0]


def test_asked_for_otherwise(original: Path, tmp_path: Path) -> None:
    quantised, plain = quantise(original, tmp_path, int4(32))
    bundle, said = converted(quantised, "--gpu-group", "128", "--cpu-format", "q8")
    assert layouts(bundle) == ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32")
    assert "rounded a second time: the source has a scale for 32 weights, the bundle for 128" in said
    assert_kept(bundle, plain, "cpu")


def test_zero_points_where_none_were_said(original: Path, tmp_path: Path) -> None:
    """``sym`` is believed for the choice of formats, and not for the weights: those are rounded then."""
    scheme = gptq(64)

    def write(weight: Array) -> Quantised:
        one = scheme.write(weight)
        scales = one.tensors["scales"][1]
        steps = np.repeat(scales.astype(np.float32).T, 64, axis=1)
        zeros = words(np.full(scales.shape, 2, np.uint8), 4)
        return Quantised(one.tensors | {"qzeros": ("I32", zeros)}, one.values + np.float32(5) * steps)

    quantised, plain = quantise(original, tmp_path, Scheme(scheme.settings, write))
    bundle, _ = converted(quantised)
    checkpoint = ShardedCheckpoint.open(plain)
    for tier in ("gpu", "cpu"):
        for name, values in unpacked(bundle, tier).items():
            exact = np.asarray(checkpoint.array(name))
            assert 0 < np.square(values - exact).sum() < 0.01 * np.square(exact).sum(), (tier, name)
