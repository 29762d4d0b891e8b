"""Hashed n-gram tables in every form that a checkpoint may hold them, and what is refused; a conversion that
breaks off within one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError, ResourceError, UnsupportedModelError
from krasis.formats.files.file_ops import FileOps
from krasis.formats.models.registry import spec_from_hf
from tests.support.tiny_checkpoints import tiny

SETTINGS: dict[str, Any] = {"tiers": ("cpu",)}
LAYERS = (0, 2)
NAME = "layers.{}.ngram.table"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen4_exp", tmp_path_factory.mktemp("qwen4_exp") / "hf")


@pytest.fixture(scope="module")
def tables(checkpoint: Path) -> dict[int, Any]:
    """Those of the checkpoint's shards, in float32."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    stem = "model.layers.{}.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    return {i: torch.cat([tensors[stem.format(i, part)] for part in range(3)]).float() for i in LAYERS}


def rewritten(checkpoint: Path, tables: dict[int, Any], folder: Path, form: str) -> Path:
    """The checkpoint with its tables in one tensor each."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    for layer, table in tables.items():
        stem = f"model.layers.{layer}.ple.ple_embedding."
        for part in range(3):
            del tensors[f"{stem}ngram_embedding.shard_{part}.weight"]
        name = f"{stem}ngram_embedding.weight"
        tensors[name] = table if form == "F32" else table.bfloat16()
        if form == "short":
            tensors[name] = table[:-200].clone()
        elif form == "hashes":
            tensors[f"{stem}layer_multipliers"] += 2
        elif form == "FP8":
            tensors[name] = (table * 128).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((-(-len(table) // 128), 1), 2.0**-7)
            block = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
            config["quantization_config"] = {"quant_method": "fp8", **block}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def held(path: Path, layer: int) -> tuple[str, np.ndarray]:
    """Type and rows, in float32, of a bundle's table."""
    with Bundle.open(path) as opened:
        data, dtype = opened.map(NAME.format(layer)), opened.blob(NAME.format(layer)).dtype
        values = (data.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else np.array(data)
        assert opened.manifest.format_minor == 2
        assert {one.name for one in opened.manifest.files} >= {"table-000.safetensors"}
    return dtype, values


@pytest.mark.parametrize("form", ["shards", "one", "F32", "FP8"])
def test_rows_are_the_sources(
    checkpoint: Path, tables: dict[int, Any], run: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    """With zeros after those of a layer that has fewer; FP8 with its scales, exact in 16 bits here."""
    source = checkpoint if form == "shards" else rewritten(checkpoint, tables, tmp_path / "hf", form)
    path = run([source], tmp_path / "out.krasis", **SETTINGS).path
    for layer, table in tables.items():
        dtype, values = held(path, layer)
        assert dtype == ("F32" if form == "F32" else "BF16")
        expected = table.numpy()
        if form == "FP8":
            import torch

            expected = ((table * 128).to(torch.float8_e4m3fn).float() / 128).numpy()
        np.testing.assert_array_equal(values[: len(expected)], expected)
        assert not values[len(expected) :].any()
    assert len(tables[0]) < len(tables[2])  # so that there are such zeros


@pytest.mark.parametrize(
    ("form", "message"), [("short", "wrong number of rows"), ("hashes", "the hashes of n-grams are not")]
)
def test_other_tables_are_refused(
    checkpoint: Path,
    tables: dict[int, Any],
    run: Callable[..., Any],
    tmp_path: Path,
    form: str,
    message: str,
) -> None:
    source = rewritten(checkpoint, tables, tmp_path / "hf", form)
    with pytest.raises(KrasisError, match=message):
        run([source], tmp_path / "out.krasis", **SETTINGS)


class DiskFails(FileOps):
    """A disk that fails at the first write to a file of tables."""

    def __init__(self) -> None:
        self.left = 1

    def pwrite(self, fd: int, *arguments: Any) -> Any:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name.startswith("table-") and self.left:
            self.left -= 1
            return super().pwrite(fd, *arguments)
        if name.startswith("table-"):
            raise OSError(5, "Input/output error")
        return super().pwrite(fd, *arguments)


def test_a_conversion_that_broke_off_goes_on(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    whole = run([checkpoint], tmp_path / "whole.krasis", **SETTINGS).files()
    with pytest.raises(ResourceError):
        run([checkpoint], tmp_path / "out.krasis", DiskFails(), **SETTINGS)
    assert run([checkpoint], tmp_path / "out.krasis", **SETTINGS).files() == whole


def test_what_a_config_means(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    with pytest.raises(UnsupportedModelError, match=r"ple_layer_ids.*got list \[4\]"):
        spec_from_hf(config | {"ple_layer_ids": [2, 4]}, "config.json")
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "output_gate_type": None}
    spec = spec_from_hf(config | plain, "config.json")  # as transformers has such defaults
    assert (spec.layers[0].mixer.gate, spec.layers[3].mixer.rope.dims) == ("silu", 32)
