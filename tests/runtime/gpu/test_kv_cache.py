"""Keys and values to the host and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.formats.errors import OutOfDeviceMemoryError
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.gpu.kernels.dtypes import numpy_dtype
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.sizes import sizes_of_shape
from krasis.runtime.state.row_form import RowForm


def small(spec: ModelSpec, num_layers: int = 3):
    from dataclasses import replace

    layer = spec.layers[0]
    mixer = replace(layer.mixer, kv_heads=2, head_dim=16, rope=replace(layer.mixer.rope, dims=16))
    return replace(spec, layers=(replace(layer, mixer=mixer),) * num_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_is_read_layer_by_layer(kernel_device, dtype: torch.dtype) -> None:
    stream = kernel_device.stream("compute")
    cache = GpuKvCache(kernel_device, stream, small(shape("qwen3-30b-a3b")), 10, dtype, num_slots=2)
    rng = np.random.default_rng(1)
    layers = [
        rng.integers(0, 60_000, (2, 2, 7, 16), dtype=np.uint16).view(numpy_dtype(dtype)) for _ in range(3)
    ]
    for index, (keys, values) in enumerate(layers):
        scratch_keys, scratch_values = keys.copy(), values.copy()
        cache.write(stream, 1, index, scratch_keys, scratch_values)
        scratch_keys[:], scratch_values[:] = 0, 0  # the caller's again
    for index, (keys, values) in enumerate(layers):
        for count in (7, 1, 4):
            found_keys, found_values = cache.read(stream, 1, index, count)
            assert found_keys.dtype == numpy_dtype(dtype)
            assert found_keys.flags.c_contiguous
            assert found_values.flags.c_contiguous
            # Compared as bits: some of them are NaN.
            np.testing.assert_array_equal(found_keys.view(np.uint16), keys[:, :count].view(np.uint16))
            np.testing.assert_array_equal(found_values.view(np.uint16), values[:, :count].view(np.uint16))

    assert not cache.read(stream, 0, 1, 7)[0].view(np.uint16).any()  # the other slot is as it was made


def test_8_bits_are_read_and_written_as_on_the_cpu(kernel_device) -> None:
    stream, spec = kernel_device.stream("compute"), small(shape("qwen3-30b-a3b"))
    cache = GpuKvCache(kernel_device, stream, spec, 10, torch.bfloat16, num_slots=2, eight_bits=True)
    form = RowForm((16,), "int8")
    floats = np.random.default_rng(3).standard_normal((3, 2, 2, 7, 16)).astype(np.float32)
    layers = form.kept(floats)
    for index, (keys, values) in enumerate(layers):
        cache.write(stream, 1, index, keys, values)
    for index, expected in enumerate(layers):
        for count in (7, 3):
            for rows, wanted in zip(cache.read(stream, 1, index, count), expected, strict=True):
                assert rows.dtype == np.uint8
                assert rows.flags.c_contiguous
                np.testing.assert_array_equal(rows, wanted[:, :count])
    assert not cache.read(stream, 0, 1, 7)[0].any()
    # Where kernels look for them: codes, and right behind them their scales.
    keys, values = cache.layer(1, 2)
    scales = cache.scales(1, 2)
    assert keys.dtype == values.dtype == torch.int8
    for codes, own in zip((keys, values), scales, strict=True):
        assert own.data_ptr() == codes.data_ptr() + codes.nbytes
    assert [one.shape[2] for pair in cache.pairs(1, 2) for one in pair] == [16, 16, 1, 1]
    assert len(cache.layers(1)) == 6


def test_it_takes_what_the_planner_counts(kernel_device) -> None:
    sizes = sizes_of_shape(shape("qwen3-30b-a3b"))
    spec = sizes.spec
    before = kernel_device.free_bytes()
    cache = GpuKvCache(kernel_device, kernel_device.stream("c"), spec, 64, torch.bfloat16)
    assert before - kernel_device.free_bytes() == sizes.kv_bytes(64, "bf16")
    assert [keys.shape for keys, _ in cache.layers()] == [(4, 64, 128)] * 48
    before = kernel_device.free_bytes()
    half = GpuKvCache(kernel_device, kernel_device.stream("h"), spec, 64, torch.bfloat16, eight_bits=True)
    assert before - kernel_device.free_bytes() == sizes.gpu_kv_bytes(64, "int8")
    assert half.memory.nbytes == sizes.kv_bytes(64, "int8") == cache.memory.nbytes * 132 // 256
    with pytest.raises(OutOfDeviceMemoryError):
        GpuKvCache(kernel_device, kernel_device.stream("d"), spec, 40_000, torch.float16)


def test_latents_are_kept_once_and_shared_by_halves(kernel_device) -> None:
    sizes = sizes_of_shape(shape("deepseek-v2-lite"))
    stream, before = kernel_device.stream("compute"), kernel_device.free_bytes()
    cache = GpuKvCache(kernel_device, stream, sizes.spec, 12, torch.float16)
    assert before - kernel_device.free_bytes() == sizes.kv_bytes(12, "f16") == 27 * 12 * 576 * 2
    latents = np.random.default_rng(2).standard_normal((1, 9, 576)).astype(np.float16)
    cache.write(stream, 0, 5, latents, np.empty((1, 9, 0), np.float16))
    found, values = cache.read(stream, 0, 5, 7)
    np.testing.assert_array_equal(found, latents[:, :7])
    assert values.shape == (1, 7, 0)
    assert not cache.read(stream, 0, 4, 9)[0].any()
    first, second = cache.layers()[5]
    assert first.shape == second.shape == (1, 12, 288)
    assert second.data_ptr() - first.data_ptr() == 288 * 2
