"""gpt-oss: rows of gate and up that take turns, biases of experts, and what a GGUF leaves unsaid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import tiny
from tiny_ggufs import read_tensors, tiny_gguf

from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.gguf import GgufCheckpoint
from krasis.formats.layouts import CpuTileLayout
from krasis.formats.models.registry import spec_from_gguf, spec_from_hf

INNER = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("gpt_oss", tmp_path_factory.mktemp("gpt_oss") / "hf")


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path) -> Path:
    return tiny_gguf(checkpoint, checkpoint.parent / "model.gguf", experts="Q8_0")


@pytest.fixture(scope="module", params=["hf", "gguf", "both"])
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, gguf_file: Path, run: Callable[..., Any]
) -> Path:
    inputs = {"hf": [checkpoint], "gguf": [gguf_file], "both": [checkpoint, gguf_file]}[request.param]
    path: Path = run(inputs, checkpoint.parent / f"{request.param}.krasis", tiers=("cpu",)).path
    return path


def test_gate_and_up_are_told_apart(bundle: Path, checkpoint: Path) -> None:
    """Of what transformers computes with: gate the even columns of ``gate_up_proj``, up the odd ones."""
    tensors = read_tensors(checkpoint)
    with Bundle.open(bundle) as opened:
        for layer in range(4):
            block = f"model.layers.{layer}.mlp.experts."
            biases = tensors[f"{block}gate_up_proj_bias"]
            found = [opened.map(f"layers.{layer}.experts.{part}.bias") for part in ("gate", "up", "down")]
            for ours, theirs in zip(
                found, (biases[:, ::2], biases[:, 1::2], tensors[f"{block}down_proj_bias"]), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
            records = opened.map(f"layers.{layer}.experts.cpu")
            for expert in (0, 5):
                both = tensors[f"{block}gate_up_proj"][expert].T
                expected = both[::2], both[1::2], tensors[f"{block}down_proj"][expert].T
                unpacked = CpuTileLayout("q8").unpack_expert(records[expert], 192, INNER)
                for ours, theirs in zip(unpacked, expected, strict=True):
                    assert np.square(ours - theirs).sum() < 1e-3 * np.square(theirs).sum()


def test_a_gguf_is_read_as_the_checkpoint_it_was_made_of(checkpoint: Path, gguf_file: Path) -> None:
    """It says neither that the rotation's ramp is not rounded nor anything of experts and sinks."""
    from_hf = spec_from_hf(json.loads((checkpoint / "config.json").read_text("utf-8")), "config.json")
    opened = GgufCheckpoint.open(gguf_file)
    from_gguf = spec_from_gguf(opened.metadata, opened.tensors, gguf_file.name)
    assert from_gguf.layers == from_hf.layers
    assert not from_gguf.layers[0].mixer.rope.scaling.truncate  # type: ignore[union-attr]
    assert [layer.mixer.window for layer in from_gguf.layers] == [16, None] * 2  # type: ignore[union-attr]
