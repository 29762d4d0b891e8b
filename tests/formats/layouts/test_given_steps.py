"""Codes and scales that somebody chose go through the packers to 4 bits as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.checkpoints.quantised.registry import quantisation_of
from krasis.formats.checkpoints.quantised.table import quantised_table
from krasis.formats.checkpoints.quantised.tensors import Tensors
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.formats.errors import FormatError, NativeError
from krasis.formats.layouts import MarlinLayout, MatrixView, bf16_to_float32, native_pack
from krasis.formats.layouts import marlin as layout
from krasis.formats.layouts.cpu_tiles import dequantize, unpack_tiles

ASSETS = Path(__file__).parents[2] / "assets" / "quantised"


def made(codes: np.ndarray, scales: np.ndarray) -> MatrixView:
    """codes int8 [n, k], scales float32 [n, k / 32]."""
    n, k = codes.shape
    values = codes.reshape(n, -1, 32).astype(np.float32) * scales[:, :, None]
    return MatrixView(values.reshape(n, k), "F32", scales)


def drawn(
    group: int, least: int = -8, most: int = 7, *, negative: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(group)
    codes = rng.integers(least, most + 1, (64, 256)).astype(np.int8)
    scales = rng.uniform(0.001, 0.02, (64, 256 // group)) * (rng.choice((-1, 1), (64, 1)) if negative else 1)
    exact = bf16_to_float32((scales.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    return codes, np.repeat(exact, group // 32, axis=1)


# Codes that do not use their range, or are all zero, hide their scale from any search.
@pytest.mark.parametrize("codes", [(-8, 7), (-3, 3), (0, 1), (0, 0)])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_marlin_keeps_codes_and_scales(pool, marlin, group: int, codes: tuple[int, int]) -> None:
    given, scales = drawn(group, *codes)
    importance = np.random.default_rng(1).random(256).astype(np.float32)
    for dtype in ("BF16", "F16"):
        words, stored, stats = marlin(pool, made(given, scales), 4, group, dtype, importance=importance)
        np.testing.assert_array_equal(layout.unpack_codes(words, 4).T.astype(np.int8) - 8, given)
        values = MarlinLayout(4, None if group == 256 else group, dtype).dequantize(words, stored).T
        np.testing.assert_array_equal(values, made(given, scales).data)
        assert (stats.squared_error, stats.max_abs_error, stats.count) == (0, 0, 64 * 256)


@pytest.mark.parametrize("codes", [(-8, 7), (-3, 3), (0, 0)])
def test_tiles_keep_codes_and_scales(pool, tiled, codes: tuple[int, int]) -> None:
    given, scales = drawn(32, *codes)
    packed, stats = tiled(pool, made(given, scales), "i4")
    found, stored = unpack_tiles(packed, "i4")
    np.testing.assert_array_equal(found, given)
    np.testing.assert_array_equal(dequantize(found, stored), made(given, scales).data)
    assert stats.squared_error == stats.max_abs_error == 0


@pytest.mark.parametrize("name", ["ct-int4-g32", "ct-int4-channel", "gptq"])
def test_the_bits_of_a_librarys_file(pool, marlin, tiled, name: str) -> None:
    """Every code is the file's own, read here without our reader; the values are what the library says."""
    checkpoint = ShardedCheckpoint.open(ASSETS / f"{name}.safetensors")
    config = {"quantization_config": json.loads(checkpoint.metadata["settings"])}
    infos = {one: info for one, info in checkpoint.tensors.items() if one != "expected"}
    table = quantised_table(quantisation_of(config, "config.json"), Tensors(infos, checkpoint.view, str))
    steps = table.weights["m.weight"].steps(0, 32)
    along = name == "gptq"
    words = np.asarray(checkpoint.array("m.qweight" if along else "m.weight_packed")).view(np.uint32)
    nibbles = words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    raw = nibbles.transpose(0, 2, 1).reshape(-1, 32).T if along else nibbles.reshape(32, -1)
    expected = np.asarray(checkpoint.array("expected"))
    twice = MatrixView(np.vstack([expected, expected]), "F32", np.vstack([steps.scales, steps.scales]))
    packed, _ = tiled(pool, twice, "i4")
    codes, scales = unpack_tiles(packed, "i4")
    np.testing.assert_array_equal(codes[:32] + 8, raw)
    np.testing.assert_array_equal(dequantize(codes, scales)[32:], expected)
    group = {"ct-int4-g32": 32, "ct-int4-channel": 256, "gptq": 64}[name]
    for dtype in ("F16", "BF16"):
        packed, scales, _ = marlin(pool, twice, 4, group, dtype)
        np.testing.assert_array_equal(layout.unpack_codes(packed, 4).T[32:], raw)
        if dtype == "F16":
            values = MarlinLayout(4, None if group == 256 else group, dtype).dequantize(packed, scales)
            np.testing.assert_array_equal(values.T[:32], expected)


def test_a_scale_that_its_type_rounds_keeps_the_codes(pool, marlin) -> None:
    given, scales = drawn(64)
    scales = scales * np.float32(1 + 2**-9)
    words, _, stats = marlin(pool, made(given, scales), 4, 64, "BF16")
    np.testing.assert_array_equal(layout.unpack_codes(words, 4).T.astype(np.int8) - 8, given)
    assert 0 < stats.relative_mse < 2**-17


@pytest.mark.parametrize("case", ["tiny", "several", "nan"])
def test_scales_that_cannot_be_kept_are_searched_for(pool, marlin, tiled, case: str) -> None:
    """As without any: nothing is clipped, and nothing that is no number is stored."""
    given, scales = drawn(256, negative=False)
    if case == "tiny":  # float16 has a few bits for these
        scales = scales * np.float32(2.0**-16)
    values, steps = made(given, scales).data, scales.copy()
    if case != "tiny":
        steps[:, 5] = np.nan if case == "nan" else 1.5 * steps[:, 5]
    found = marlin(pool, MatrixView(values, "F32", steps), 4, 64, "F16")
    expected = marlin(pool, MatrixView(values, "F32"), 4, 64, "F16")
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    if case != "several":
        packed = [tiled(pool, MatrixView(values, "F32", one), "i4")[0] for one in (steps, None)]
        np.testing.assert_array_equal(*packed)


def test_steps_of_another_matrix_are_refused() -> None:
    values = np.zeros((64, 256), np.float32)
    for steps in (np.zeros((64, 7), np.float32), np.zeros((32, 8), np.float32), np.zeros((64, 8))):
        with pytest.raises(FormatError, match="steps do not fit"):
            MatrixView(values, "F32", steps)
    with pytest.raises(FormatError, match="steps do not fit"):
        MatrixView(values.astype(np.float16), "F16", np.zeros((64, 8), np.float32))


def test_the_native_function_refuses_what_is_no_number(pool, monkeypatch, marlin, tiled) -> None:
    given, scales = drawn(64)
    matrix = made(given, scales)
    for bad in (np.inf, np.nan):
        monkeypatch.setattr(native_pack, "given_steps", lambda *_, bad=bad: np.full((64, 8), bad, np.float32))
        with pytest.raises(NativeError):
            marlin(pool, matrix, 4, 32, "BF16")
        with pytest.raises(NativeError):
            tiled(pool, matrix, "i4")
