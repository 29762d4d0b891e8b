"""A plan of a bundle knows what it weighs, and a plan of the model alone what its bundle will weigh."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.planning import sizes_of_bundle, sizes_of_shape
from tests.support.tiny_checkpoints import tiny

pytest.importorskip("transformers")


def run_main(module: str, *arguments: str | Path) -> str:
    code = f"from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe"])
def test_a_bundle_weighs_what_its_model_said(family: str, tmp_path: Path) -> None:
    path = tmp_path / f"{family}.krasis"
    source = tiny(family, tmp_path / family)
    run_main("krasis.convert.cli", source, "-o", path, "--quiet", "--gpu-group", "32")
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
    sizes = sizes_of_bundle(manifest)
    planned = sizes_of_shape(manifest.spec, manifest.layouts["gpu"], manifest.layouts["cpu"])
    assert dataclasses.replace(planned, source="bundle") == sizes
    tiers = {"gpu": 0, "cpu": 0, "dense": 0}
    for blob in manifest.blobs:
        tiers[blob.tier] += blob.num_bytes
    assert (sizes.gpu_experts_bytes, sizes.cpu_experts_bytes) == (tiers["gpu"], tiers["cpu"])
    options = ("--plan", "--json", "--gpus", "1x2GiB", "--ram", "8GiB", "--cpus", "8")
    plan = json.loads(run_main("krasis.runtime.cli.info_command", path, *options))["plan"]
    assert plan["gpus"][0]["resident_experts"] == sizes.num_experts
    assert plan["gpus"][0]["resident_bytes"] == tiers["gpu"]
    assert plan["sizes"]["model"] == manifest.spec.to_json()
