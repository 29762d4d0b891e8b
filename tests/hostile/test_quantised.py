"""Quantised weights whose parts are missing, lie or do not fit each other, one a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from twin_quantisers import SCHEMES, Tensors

from krasis.formats.checkpoints.quantised.registry import quantisation_of
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.table import quantised_table
from krasis.formats.checkpoints.quantised.tensors import Tensors as Checkpoint
from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError

WEIGHT = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
Change = Callable[[Tensors], None]


def read(scheme: str, change: Change) -> np.ndarray:
    """Opens and dequantises a weight of ``scheme`` after a change of its parts."""
    parts = SCHEMES[scheme].write(WEIGHT).tensors
    change(parts)
    tensors = {f"m.{part}": (dtype, np.ascontiguousarray(one)) for part, (dtype, one) in parts.items()}
    infos = {
        name: Stored(name, dtype, one.shape, name, bytes_of(tensors))
        for name, (dtype, one) in tensors.items()
    }
    quantisation = quantisation_of({"quantization_config": SCHEMES[scheme].settings}, "config.json")
    assert quantisation is not None
    table = quantised_table(
        quantisation, Checkpoint(infos, bytes_of(tensors), lambda name: f"m.st: '{name}'")
    )
    (weight,) = table.weights.values()
    return weight.decode(0, weight.shape[0])


def bytes_of(tensors: Tensors) -> Callable[[str], np.ndarray]:
    return lambda name: tensors[name][1].reshape(-1).view(np.uint8)


def without(part: str) -> Change:
    return lambda parts: parts.pop(part) and None


def shaped(part: str, *shape: int) -> Change:
    def change(parts: Tensors) -> None:
        dtype, values = parts[part]
        parts[part] = dtype, np.resize(values, shape)

    return change


def typed(part: str, dtype: str, values: Any = None) -> Change:
    def change(parts: Tensors) -> None:
        old = parts[part][1]
        parts[part] = dtype, old if values is None else np.asarray(values)

    return change


def holding(part: str, value: float, index: Any = 0) -> Change:
    def change(parts: Tensors) -> None:
        dtype, values = parts[part]
        values = values.copy()
        values.reshape(-1)[index] = value
        parts[part] = dtype, values

    return change


CASES: dict[str, tuple[str, Change, list[str]]] = {
    "no_block_scales": ("fp8", without("weight_scale_inv"), ["m.weight'", "lacks its weight_scale"]),
    "no_packed_scales": ("int4", without("weight_scale"), ["weight_packed'", "lacks its weight_scale"]),
    "no_gptq_scales": ("gptq", without("scales"), ["m.qweight'", "lacks its scales"]),
    "no_gptq_zeros": ("gptq", without("qzeros"), ["lacks its qzeros"]),
    "no_order_of_inputs": ("gptq", without("g_idx"), ["lacks its g_idx"]),
    "no_awq_zeros": ("awq", without("qzeros"), ["lacks its qzeros"]),
    "no_nvfp4_factor": ("nvfp4", without("weight_global_scale"), ["lacks its weight_global_scale"]),
    "no_modelopt_factor": ("modelopt", without("weight_scale_2"), ["lacks its weight_global_scale"]),
    "no_mxfp4_scales": ("mxfp4", without("weight_scale"), ["lacks its weight_scale"]),
    "one_block_too_few": ("fp8", shaped("weight_scale_inv", 2, 1 + 2), ["[2, 3]", "[2, 2]"]),
    "scales_of_another_weight": ("int4", shaped("weight_scale", 256, 9), ["[256, 9]", "[256, 8]"]),
    "scales_turned": ("fp8_channel", shaped("weight_scale", 1, 256), ["[1, 256]", "[256, 1]"]),
    "scales_of_rank_five": ("fp8_channel", shaped("weight_scale", 1, 1, 1, 1, 256), ["do", "not fit"]),
    "empty_scales": ("mxfp4", shaped("weight_scale", 256, 0), ["[256, 0]"]),
    "nvfp4_scales_of_mxfp4": ("nvfp4", shaped("weight_scale", 256, 8), ["[256, 8]", "a scale for 16"]),
    "whole_numbers_as_scales": ("fp8_channel", typed("weight_scale", "I32"), ["I32", "F32"]),
    "factor_for_each_row": ("nvfp4", shaped("weight_global_scale", 256), ["one number a matrix"]),
    "nan_among_scales": (
        "fp8_channel",
        holding("weight_scale", np.nan, 3),
        ["NaN or infinity", "weight_scale"],
    ),
    "nan_among_bf16_scales": ("fp8", holding("weight_scale_inv", 0x7FC0), ["NaN or infinity"]),
    "infinite_f16_scale": ("gptq", holding("scales", np.inf, 7), ["NaN or infinity", "scales"]),
    "nan_among_e4m3_scales": ("nvfp4", holding("weight_scale", 0x7F), ["NaN or infinity"]),
    "nan_among_e8m0_scales": ("mxfp4", holding("weight_scale", 255), ["NaN or infinity"]),
    "infinite_factor": ("modelopt", holding("weight_scale_2", np.inf), ["NaN or infinity", "scale_2"]),
    "divided_by_zero": ("nvfp4", holding("weight_global_scale", 0), ["divided by is 0", "global_scale"]),
    "group_that_is_not_there": ("gptq", holding("g_idx", 4, 9), ["g_idx", "got 4", "limit 0..3"]),
    "negative_group": ("gptq", holding("g_idx", -1), ["g_idx", "got -1"]),
    "largest_group": ("gptq", holding("g_idx", 2**31 - 1), ["g_idx", f"got {2**31 - 1}"]),
    "groups_of_fewer_inputs": ("gptq", shaped("g_idx", 255), ["g_idx", "[255]", "[256]"]),
    "groups_as_floats": ("gptq", typed("g_idx", "F32"), ["g_idx", "F32", "I32"]),
    "zeros_of_three_bits": ("gptq", shaped("qzeros", 4, 24), ["2, 4 or 8 bits"]),
    "zeros_of_other_groups": ("awq", shaped("qzeros", 5, 32), ["qzeros", "[5, 32]"]),
    "zeros_of_no_words": ("gptq", shaped("qzeros", 4, 0), ["2, 4 or 8 bits"]),
    "codes_of_other_outputs": ("gptq", shaped("qweight", 32, 255), ["[32, 255]", "[.., 256]"]),
    "awq_codes_in_gptq_order": ("awq", shaped("qweight", 32, 256), ["[32, 256]", "[.., 32]"]),
    "codes_as_a_vector": ("int4", shaped("weight_packed", 1024), ["no matrix", "[1024]"]),
    "codes_without_rows": ("fp8", shaped("weight", 0, 256), ["no matrix", "[0, 256]"]),
    "codes_as_floats": ("gptq", typed("qweight", "F32"), ["qweight", "F32", "I32"]),
    "scales_without_groups": ("awq", shaped("scales", 0, 256), ["[0, 256]", "[groups, output features]"]),
    "uneven_groups": ("awq", shaped("scales", 3, 256), ["qzeros"]),
    "another_shape_beside_it": ("int4", holding("weight_shape", 1 << 62), ["weight_shape", str(1 << 62)]),
    "negative_shape": ("int4", holding("weight_shape", -256, 1), ["weight_shape", "-256", "[256, 256]"]),
    "shape_of_three_sizes": ("int4", shaped("weight_shape", 3), ["weight_shape", "2 sizes"]),
    "shape_as_floats": ("int4", typed("weight_shape", "F64", np.ones(2)), ["weight_shape", "F64"]),
}


@pytest.mark.parametrize("name", CASES)
def test_told_in_one_sentence(name: str) -> None:
    scheme, change, parts = CASES[name]
    with pytest.raises(FormatError) as caught:
        read(scheme, change)
    sentence = str(caught.value)
    assert all(part in sentence for part in parts), sentence
    assert "m." in sentence
    assert sentence.isprintable()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unchanged_they_are_read(scheme: str) -> None:
    np.testing.assert_allclose(
        read(scheme, lambda parts: None), SCHEMES[scheme].write(WEIGHT).values, rtol=1e-6
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_part_that_goes_missing_is_an_error(scheme: str) -> None:
    """Or, of those that are not needed, changes no value."""
    needless = {"weight_shape"}
    written = SCHEMES[scheme].write(WEIGHT)
    for part in written.tensors:
        try:
            values = read(scheme, without(part))
        except (KrasisError, ValueError):  # ValueError: no weight is left to read
            continue
        assert part in needless, part
        np.testing.assert_allclose(values, written.values, rtol=1e-6)


def test_inputs_that_are_scaled_before_a_product() -> None:
    def change(parts: Tensors) -> None:
        parts["pre_quant_scale"] = "F32", np.ones(256, np.float32)

    with pytest.raises(UnsupportedModelError, match=r"pre_quant_scale.*inputs are scaled"):
        read("modelopt", change)


def test_the_same_weight_twice() -> None:
    def change(parts: Tensors) -> None:
        parts["weight"] = "BF16", np.zeros((256, 256), np.uint16)

    with pytest.raises(FormatError, match="twice"):
        read("int4", change)
