"""Sizes that no kernel takes are named before any work; what is imported for a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from krasis.formats.errors import UnsupportedModelError
from krasis.runtime.gpu.opening import refuse
from krasis.runtime.planning.presets import shape
from krasis.runtime.settings import EngineSettings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_rank": 480}, r"do not take this size of latents \(got 480; limit multiples of 64"),
        ({"q_rank": 1504}, r"this size of the queries' latents \(got 1504"),
        ({"nope_dim": 96}, r"this head size \(got 96"),
        (
            {"kv_rank": 544, "rope": None, "rope_dim": 32},
            r"too many channels of latents .*got 544; limit 512",
        ),
        (
            {"kv_rank": 448, "rope": None, "rope_dim": 80},
            r"too many rotated channels beside latents .*got 80",
        ),
    ],
)
def test_sizes_of_latent_attention(changes: dict[str, Any], words: str) -> None:
    spec = shape("deepseek-v3")
    layer = spec.layers[-1]
    odd = replace(layer, mixer=replace(layer.mixer, **changes))
    manifest = SimpleNamespace(layouts={"gpu": "marlin-u4b8-g128-bf16"})
    whole, changed = (
        SimpleNamespace(spec=replace(spec, layers=layers), path="model.krasis", manifest=manifest)
        for layers in (spec.layers, (*spec.layers[:-1], odd))
    )
    refuse(whole, EngineSettings(device="double"))
    with pytest.raises(UnsupportedModelError, match=words):
        refuse(changed, EngineSettings(device="double"))


def test_what_runs_on_gpus_does_without_torchs_compiler() -> None:
    code = "import sys, krasis.runtime.gpu.backend; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "torch" in modules.split()
    # Each costs a start as much as all the rest of torch.
    assert {"torch._dynamo", "torch._inductor", "sympy"}.isdisjoint(modules.split())
