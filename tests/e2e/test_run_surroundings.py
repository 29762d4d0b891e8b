"""krasis-run where a cluster's launcher, a missing GPU or a control group would disturb it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
ASK = ["--raw", "--prompt", "x", "--max-tokens", "2", "--ctx", "64", "--threads", "1"]


def run(bundle: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, str(bundle), *ASK, *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29555",
            "TORCHELASTIC_RUN_ID": "none",
        },
        {"WORLD_SIZE": "many", "RANK": "x"},
    ],
    ids=["pod-of-two", "second-node", "child-of-a-rank", "words"],
)
def test_a_launchers_variables_do_not_disturb_one_run(chat_bundle: Path, variables: dict[str, str]) -> None:
    done = run(chat_bundle, "--device", "cpu", **variables)
    alone = run(chat_bundle, "--device", "cpu", "--temperature", "0")
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr
    assert done.stdout.strip()
    assert done.stderr.count("of a job's launcher are ignored") == 1
    assert "ignored" not in alone.stderr


def test_gpu_options_without_a_gpu_say_that_they_do_nothing(chat_bundle: Path) -> None:
    done = run(chat_bundle, "--gpus", "1", "--vram", "4GiB", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "note: --gpus and --vram do nothing: the model runs on the CPU (" in done.stderr
    refused = run(chat_bundle, "--gpus", "1", "--device", "cpu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--gpus needs GPUs (got --device cpu)" in refused.stderr
    forced = run(chat_bundle, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert (forced.returncode, forced.stdout) == (6, "")
    assert "there is no GPU: " in forced.stderr
