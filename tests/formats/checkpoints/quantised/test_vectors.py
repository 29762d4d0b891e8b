"""Weights that the quantising libraries wrote, against what these say that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.checkpoints.quantised.registry import quantisation_of
from krasis.formats.checkpoints.quantised.table import quantised_table
from krasis.formats.checkpoints.quantised.tensors import Tensors
from krasis.formats.checkpoints.quantised.weight import QuantisedWeight
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint

VECTORS = sorted((Path(__file__).parents[3] / "assets" / "quantised").glob("*.safetensors"))
TYPES = {
    "fp8": (
        "fp8-blocks",
        "fp8-blocks-ue8m0",
        "modelopt-fp8",
        "ct-fp8-block",
        "ct-fp8-channel",
        "ct-fp8-tensor",
    ),
    "mxfp8": ("modelopt-mxfp8", "ct-mxfp8"),
    "int8": ("ct-int8-channel", "ct-int8-channel-asym", "ct-int8-g64", "gptq-8bit"),
    "nvfp4": ("modelopt-nvfp4", "ct-nvfp4"),
    "mxfp4": ("ct-mxfp4", "mxfp4-blocks", "fp8-experts-of-fp4"),
    "int4": (
        *("ct-int4-g32", "ct-int4-g128-asym", "ct-int4-channel", "awq"),
        *("gptq", "gptq-act-order", "gptq-asym-v1", "gptq-asym-v2"),
    ),
    "int2": ("gptq-2bit",),
}


def opened(path: Path) -> tuple[QuantisedWeight, np.ndarray]:
    """The weight of a file of vectors, and what the library made of it."""
    checkpoint = ShardedCheckpoint.open(path)
    config = {"quantization_config": json.loads(checkpoint.metadata["settings"])}
    quantisation = quantisation_of(config, "config.json")
    assert quantisation is not None
    infos = {name: info for name, info in checkpoint.tensors.items() if name != "expected"}
    table = quantised_table(quantisation, Tensors(infos, checkpoint.view, str))
    assert not table.plain, "a part was left over"
    assert list(table.weights) == ["m.weight"]
    return table.weights["m.weight"], np.asarray(checkpoint.array("expected"))


def test_all_vectors_are_here() -> None:
    assert sorted(name for names in TYPES.values() for name in names) == sorted(path.stem for path in VECTORS)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_values_are_the_librarys(path: Path) -> None:
    weight, expected = opened(path)
    assert path.stem in TYPES[weight.dtype]
    assert weight.shape == expected.shape
    rows = expected.reshape(-1, expected.shape[-1])
    np.testing.assert_array_equal(weight.decode(0, len(rows)), rows)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_any_rows_alone(path: Path) -> None:
    weight, expected = opened(path)
    rows = expected.reshape(-1, expected.shape[-1])
    for first, count in ((0, 1), (5, 3), (len(rows) - 7, 7), (len(rows) - 1, 1)):
        np.testing.assert_array_equal(weight.decode(first, count), rows[first : first + count])


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_a_block_of_the_codes_is_where_it_says(path: Path) -> None:
    """Other codes in a block change the weight that it is said to begin with, and no row of others."""
    weight, expected = opened(path)
    _, num_bytes = weight.block
    raw = weight.codes.bytes()
    num_blocks = raw.nbytes // num_bytes
    before = weight.decode(0, len(expected.reshape(-1, expected.shape[-1])))
    for block in (0, 1, num_blocks // 3, num_blocks - 1):
        changed = raw.copy()
        changed[block * num_bytes : (block + 1) * num_bytes] ^= 0x11
        views = {weight.codes.name: changed}
        after = _with_bytes(weight, views).decode(0, len(before))
        row, column = weight.locate(block)
        assert before[row, column] != after[row, column]
        assert np.count_nonzero(before != after) <= weight.block[0]


def _with_bytes(weight: QuantisedWeight, views: dict[str, np.ndarray]) -> QuantisedWeight:
    from dataclasses import replace

    codes = replace(weight.codes, view=lambda name: views[name])
    return replace(weight, codes=codes)  # type: ignore[type-var]
