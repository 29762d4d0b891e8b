"""Mapped arrays on the device, byte for byte."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from krasis.runtime.gpu.upload import Uploader
from krasis.runtime.gpu.weights import _Block
from tests.support.patience import PATIENCE_S


@pytest.mark.parametrize(("piece_bytes", "threads"), [(1, 1), (7, 3), (100, 2), (10_000, 1)])
def test_arrays_arrive_in_pieces_of_any_size(kernel_device: Any, piece_bytes: int, threads: int) -> None:
    stream = kernel_device.stream("compute")
    uploader = Uploader(kernel_device, stream, piece_bytes, threads)
    rng = np.random.default_rng(3)
    sources = [rng.integers(0, 255, size, dtype=np.uint8) for size in (1, 6, 7, 99, 100, 101, 350)]
    targets = [kernel_device.empty((len(source),), torch.uint8) for source in sources]
    for source, target in zip(sources, targets, strict=True):
        source.setflags(write=False)
        uploader.put(source, target)
    uploader.finish()
    uploader.close()
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(target.numpy(), source)


def test_several_threads_copy_side_by_side(kernel_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, real = threading.Barrier(3, timeout=PATIENCE_S), np.copyto

    def copyto(target: Any, source: Any) -> None:
        together.wait()
        real(target, source)

    monkeypatch.setattr(np, "copyto", copyto)
    source = np.arange(60, dtype=np.uint8)
    with Uploader(kernel_device, kernel_device.stream("compute"), 10, 3) as uploader:
        target = kernel_device.empty((60,), torch.uint8)
        uploader.put(source, target)
        uploader.finish()
    np.testing.assert_array_equal(target.numpy(), source)


def test_a_block_holds_arrays_of_all_types_apart(kernel_device: Any) -> None:
    block, rng = _Block(), np.random.default_rng(4)
    arrays = {
        "int8": rng.integers(-128, 127, (2, 3, 32, 4), dtype=np.int8),
        "float32": rng.normal(size=5).astype(np.float32),
        "bfloat16": rng.integers(0, 2**15, (3, 7), dtype=np.uint16),
        "float16": rng.normal(size=(1, 3)).astype(np.float16),
        "strided": rng.normal(size=(4, 6)).astype(np.float32)[:, ::2],
    }
    kinds = {"bfloat16": torch.bfloat16}
    made = {name: block.array(array, kinds.get(name)) for name, array in arrays.items()}
    with pytest.raises(RuntimeError, match="not filled"):
        made["int8"]()
    block.fill(kernel_device, kernel_device.stream("compute"))
    for name, array in arrays.items():
        tensor = made[name]()
        assert tensor.data_ptr() % 256 == 0
        assert tensor.shape == array.shape
        found = tensor.view(torch.int16).numpy().view(np.uint16) if name == "bfloat16" else tensor.numpy()
        np.testing.assert_array_equal(found, array)
    assert block.num_bytes == block.memory.numel()
