"""Rows of a quantised weight, and what is made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from twin_quantisers import SCHEMES

from krasis.convert.quantised_slice import quantised_slice
from krasis.formats.checkpoints.quantised.registry import quantisation_of
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.table import quantised_table
from krasis.formats.checkpoints.quantised.tensors import Tensors
from krasis.formats.errors import FormatError

SHAPE = (192, 128)


@pytest.fixture(params=["fp8", "int4", "gptq", "nvfp4"])
def slice_and_values(request: pytest.FixtureRequest):
    scheme = SCHEMES[request.param]
    written = scheme.write(np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32))
    kept = {f"m.{part}": np.ascontiguousarray(one) for part, (_, one) in written.tensors.items()}

    def view(name: str) -> np.ndarray:
        return kept[name].reshape(-1).view(np.uint8)

    infos = {
        f"m.{part}": Stored(f"m.{part}", dtype, one.shape, part, view)
        for part, (dtype, one) in written.tensors.items()
    }
    quantisation = quantisation_of({"quantization_config": scheme.settings}, "config.json")
    (weight,) = quantised_table(quantisation, Tensors(infos, view, str)).weights.values()
    return quantised_slice(weight, "m.weight", 0, SHAPE[0]), written.values


def test_rows_of_rows(slice_and_values) -> None:
    piece, values = slice_and_values
    inner = piece.rows(64, 500).rows(3, 20)
    assert inner.shape == (17, 128)
    np.testing.assert_allclose(inner.decode(), values[67:84], rtol=1e-6)
    np.testing.assert_array_equal(inner.matrix().data, inner.decode())


def test_bytes_are_counted_once(slice_and_values) -> None:
    piece, _ = slice_and_values
    parts = [piece.rows(start, start + 50) for start in range(0, SHAPE[0], 50)]
    assert sum(part.raw.nbytes for part in parts) == piece.raw.nbytes == piece.total_bytes
    assert sum(part.offset_bytes + part.raw.nbytes == part.total_bytes for part in parts) >= 1


def test_rows_at_places(slice_and_values) -> None:
    piece, values = slice_and_values
    places = np.array([5, 0, 191, 77])
    taken = piece.at_rows(places)
    assert taken.shape == (4, 128)
    assert taken.is_float
    np.testing.assert_allclose(taken.decode(), values[places], rtol=1e-6)
    np.testing.assert_array_equal(taken.rows(1, 3).decode(), taken.decode()[1:3])


def test_other_weights_in_its_place(slice_and_values) -> None:
    piece, values = slice_and_values
    raw = (values + np.float32(1)).reshape(-1).view(np.uint8)
    for other in (piece.plain(values + np.float32(1)), replace(piece, dtype="F32", raw=raw)):
        assert other.is_float
        np.testing.assert_array_equal(other.decode(), values + np.float32(1))
        np.testing.assert_array_equal(other.rows(7, 9).matrix().data, values[7:9] + np.float32(1))


def test_codes_apart_from_their_scales_are_refused(slice_and_values) -> None:
    """They would be multiplied by those of other rows."""
    piece, _ = slice_and_values
    moved = replace(piece, raw=piece.raw[::-1].copy())
    for use in (moved.decode, moved.matrix, lambda: moved.blocks("Q8_0"), lambda: moved.rows(0, 3)):
        with pytest.raises(FormatError, match="apart from their scales"):
            use()
