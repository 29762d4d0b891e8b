import gguf
import numpy as np
import pytest

from krasis.formats.checkpoints.ggml_blocks import (
    BLOCK_SIZES,
    SUPPORTED_TYPES,
    dequantize,
    row_bytes,
    tensor_bytes,
)
from krasis.formats.errors import FormatError


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
def test_every_type_dequantises_as_the_reference_does(name):
    elements, num_bytes = BLOCK_SIZES[name]
    rng = np.random.default_rng(3)
    shape = (2, 3, 2 * elements)
    raw = rng.integers(0, 60, tensor_bytes(name, shape), dtype=np.uint8)  # small bytes: scales stay finite
    kind = gguf.GGMLQuantizationType[name]
    if name == "F64":
        expected = raw.view("<f8").astype(np.float32)
    else:
        expected = gguf.quants.dequantize(raw.reshape(6, 2 * num_bytes), kind)
    result = dequantize(raw, name, shape)
    assert result.dtype == np.float32
    assert result.shape == shape
    np.testing.assert_array_equal(result.reshape(-1), np.asarray(expected, np.float32).reshape(-1))


def test_quantised_weights_come_back_close():
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for name, tolerance in (("Q8_0", 0.01), ("BF16", 0.01), ("Q4_0", 0.2)):
        packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
        error = np.abs(dequantize(packed.view(np.uint8).reshape(-1), name, (8, 64)) - weights).max()
        assert error < tolerance * np.abs(weights).max()


def test_the_types_in_use_are_supported():
    common = {"F32", "F16", "BF16", "Q4_0", "Q5_K", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "Q2_K", "MXFP4"}
    assert common <= set(SUPPORTED_TYPES)
    assert not set(SUPPORTED_TYPES) & {"I8", "I32"}


def test_sizes():
    assert row_bytes("Q8_0", 64) == 68
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
    with pytest.raises(FormatError, match=r"w: .*whole number of Q8_0 blocks.*got 33"):
        tensor_bytes("Q8_0", (4, 33), "w")
    with pytest.raises(FormatError, match="overflow"):
        tensor_bytes("F32", (1 << 40, 1 << 40), "w")
    with pytest.raises(FormatError, match="unknown GGML type"):
        row_bytes("Q9_9", 32)


def test_wrong_amounts_and_types_are_refused():
    with pytest.raises(FormatError, match="another size"):
        dequantize(np.zeros(33, np.uint8), "Q8_0", (1, 32))
    with pytest.raises(FormatError, match=r"cannot be dequantised.*I32"):
        dequantize(np.zeros(4, np.uint8), "I32", (1,))
