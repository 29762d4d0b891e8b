"""Stretches of one weight are found wherever they lie, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from krasis.convert.constant_runs import LONG_BYTES, ConstantRun, constant_runs
from krasis.convert.slices import TensorSlice
from krasis.formats.checkpoints.ggml_blocks import block_size

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def piece_of(values: np.ndarray, dtype: str) -> TensorSlice:
    """A slice with those values; its bytes begin at an odd address, as a file's may."""
    if dtype == "BF16":
        raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    elif dtype in FLOATS:
        raw = values.astype(FLOATS[dtype]).tobytes()
    else:
        raw = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[dtype]).tobytes()
    data = np.frombuffer(b"\0" + raw, np.uint8)[1:]
    return TensorSlice("t", "file: 't'", dtype, values.shape, data, 0, data.nbytes)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.05


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("shape", [(64, 64), (512, 256), (2048, 768)])
@pytest.mark.parametrize("value", [0.0, 0.375])
def test_finds_a_stretch(dtype: str, shape: tuple[int, int], value: float) -> None:
    values = random(*shape)
    total, block = values.size, block_size(dtype)[0]
    long = max(total // 8, min(total // 8, LONG_BYTES * block // block_size(dtype)[1])) + 2 * block
    for start in (0, 7 * block, total // 3 // block * block, total - long // block * block):
        changed = values.copy()
        stop = min(total, start + long // block * block)
        changed.reshape(-1)[start:stop] = value
        (run,) = constant_runs(piece_of(changed, dtype))
        assert (run.start, run.stop, run.is_zero) == (start, stop, value == 0.0)


def test_finds_a_whole_tensor_and_several_stretches() -> None:
    assert constant_runs(piece_of(np.zeros((64, 96)), "BF16")) == [ConstantRun(0, 64 * 96, True)]
    values = random(128, 128)
    values[:32], values[64:96] = 0.0, 1.0
    assert constant_runs(piece_of(values, "BF16")) == [
        ConstantRun(0, 32 * 128, True),
        ConstantRun(64 * 128, 96 * 128, False),
    ]


def honest() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    thin = random(512, 512)
    thin[rng.random(thin.shape) < 0.97] = 0.0  # pruned without structure
    rows = random(512, 512)
    rows[rng.permutation(512)[:100]] = 0.0  # pruned rows, here and there
    return {
        "random": random(1024, 512),
        "few values": rng.choice([-0.5, -0.25, 0.25, 0.5], (512, 512)),
        "thinned": thin,
        "single rows of zeros": rows[::2],
        "equal rows": np.repeat(random(1, 512), 256, axis=0),
        "short": random(32, 32),
        "few zeros at the end": np.concatenate([random(1000, 64), np.zeros((40, 64))]),
    }


@pytest.mark.parametrize("case", honest())
@pytest.mark.parametrize("dtype", ["BF16", "F32", "Q8_0"])
def test_takes_nothing_else_for_one(case: str, dtype: str) -> None:
    assert not constant_runs(piece_of(honest()[case], dtype))


def test_reads_a_long_stretch_to_its_end(monkeypatch: Any) -> None:
    monkeypatch.setattr("krasis.convert.constant_runs._READ_BYTES", 4096)
    values = random(2048, 512)
    values.reshape(-1)[1001:1000001] = 0.0
    assert constant_runs(piece_of(values, "BF16")) == [ConstantRun(1001, 1000001, True)]
