"""GPUs that are there, hidden or not, and what is said of options that do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from krasis.runtime.host.visible_gpus import gpus_hidden, has_gpu, idle_options_note


@pytest.fixture
def gpu_machine(tmp_path: Path) -> Path:
    for name in ("proc/driver/nvidia/version", "dev/nvidia0", "dev/nvidiactl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize("value", ["", " ", "-1", "-1,0", "NoDevFiles", "none"])
def test_what_hides_every_gpu(gpu_machine: Path, value: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": value}
    assert gpus_hidden(environment) == f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU"
    assert not has_gpu(gpu_machine, environment)


@pytest.mark.parametrize("value", ["0", "1,0", "GPU-8932f937", "MIG-1", "0,-1"])
def test_what_leaves_some(gpu_machine: Path, value: str) -> None:
    assert gpus_hidden({"CUDA_VISIBLE_DEVICES": value}) == ""
    assert has_gpu(gpu_machine, {"CUDA_VISIBLE_DEVICES": value})


def test_a_driver_without_devices_is_a_container_without_gpus(gpu_machine: Path) -> None:
    assert has_gpu(gpu_machine, {})
    (gpu_machine / "dev/nvidia0").unlink()
    assert not has_gpu(gpu_machine, {})


def test_idle_options_are_told_with_the_reason(tmp_path: Path, gpu_machine: Path) -> None:
    assert idle_options_note([], "auto") == ""
    empty = tmp_path / "empty"
    assert idle_options_note(["--vram"], "auto", empty, {}) == (
        "--vram does nothing: the model runs on the CPU (no NVIDIA driver is loaded)"
    )
    assert "--gpus and --vram do nothing" in idle_options_note(["--gpus", "--vram"], "auto", empty, {})
    assert "(--device cpu was given)" in idle_options_note(["--vram"], "cpu", gpu_machine, {})
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in idle_options_note(
        ["--vram"], "auto", gpu_machine, hidden
    )
