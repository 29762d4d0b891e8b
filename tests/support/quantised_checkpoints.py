"""Checkpoints whose matrices somebody quantised, beside the same with what they stand for."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from twin_quantisers import Quantised, Scheme

from krasis.formats.checkpoints.safetensors import ShardedCheckpoint

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[str, Array]]


def write_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file of any types, also those that NumPy lacks."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, array) in tensors.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def is_projection(name: str) -> bool:
    """Which weights are quantised unless a test says otherwise."""
    return name.endswith("_proj.weight")


def quantise(
    source: Path, folder: Path, scheme: Scheme, which: Callable[[str], bool] = is_projection
) -> tuple[Path, Path]:
    """(a quantised checkpoint, its twin with the values in float32), made of a plain BF16 one."""
    checkpoint = ShardedCheckpoint.open(source)
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, info in checkpoint.tensors.items():
        bits = np.asarray(checkpoint.array(name))
        if not which(name):
            quantised[name] = plain[name] = (info.dtype, bits)
            continue
        one = scheme.write((bits.astype(np.uint32) << 16).view(np.float32))
        root = name.removesuffix("weight")
        quantised |= {f"{root}{part}": tensor for part, tensor in one.tensors.items()}
        plain[name] = ("F32", one.values)
    return (
        _folder(source, folder / "quantised", quantised, scheme.settings),
        _folder(source, folder / "plain", plain, None),
    )


def _folder(source: Path, folder: Path, tensors: Tensors, settings: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_file(folder / "model.safetensors", tensors)
    return folder


__all__ = ["Quantised", "is_projection", "quantise", "write_file"]
