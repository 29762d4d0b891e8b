"""The command itself: what it prints, what it returns, and how it stops."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import krasis.convert.cli as cli
from krasis.convert.partial import partial_path

COMMAND = [sys.executable, "-c", "from krasis.convert.cli import main; main()"]


@pytest.fixture
def invoke():
    """``invoke(*arguments)`` in this process."""

    def call(*arguments):
        return CliRunner().invoke(
            cli.main, [str(argument) for argument in arguments], prog_name="krasis-convert"
        )

    return call


def test_converts_and_says_what_it_did(invoke, hf_dir, q8_gguf, bundle, digests_of, tmp_path):
    out = tmp_path / "tiny.krasis"
    result = invoke(q8_gguf, hf_dir, "-o", out)
    assert result.exit_code == 0, result.output
    assert digests_of(out) == bundle.files()
    assert result.stdout == ""
    for text in ("both inputs hold the same model", "experts.gpu.w13", "lm_head", "GB/s", "peak memory"):
        assert text in result.stderr
    assert result.stderr.rstrip().endswith(f"next: krasis-run {out}")


def test_json_summary(invoke, hf_dir, tmp_path):
    result = invoke(hf_dir, "-o", tmp_path / "tiny.krasis", "--json", "-q", "--verify", "--threads", "1")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["tier_bytes"].keys() == {"dense", "gpu", "cpu"}
    assert summary["total_bytes"] == sum(p.stat().st_size for p in (tmp_path / "tiny.krasis").iterdir())
    assert 0.004 < summary["quality"]["experts.gpu.w2"]["relative_mse"] < 0.012
    assert summary["peak_bytes"] > 1 << 20
    assert summary["gb_per_s"] > 0


def test_dry_run_prints_the_plan_and_writes_nothing(invoke, hf_dir, q8_gguf, tmp_path, bundle, monkeypatch):
    out = tmp_path / "tiny.krasis"
    result = invoke(hf_dir, q8_gguf, "-o", out, "--dry-run")
    assert result.exit_code == 0, result.output
    for text in ("gpu", "marlin-u4b8-g128-bf16", "cpu-q8-r32-b32", "free", "beyond the page cache", "time:"):
        assert text in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert "NOT enough" not in result.stdout
    for module in ("conversion", "resources"):
        monkeypatch.setattr(f"krasis.convert.{module}.free_disk_bytes", lambda _: 1 << 20)
    short = invoke(hf_dir, "-o", out, "--dry-run")
    assert short.exit_code == 6
    assert "1.05 MB free, which is NOT enough: 7" in short.stdout
    assert "not enough disk space for the bundle (got 1.05 MB free; limit 7" in short.stderr
    monkeypatch.undo()
    plan = json.loads(invoke(hf_dir, q8_gguf, "-o", out, "--dry-run", "--json").stdout)
    assert plan["tier_bytes"] == dict(bundle.summary.tier_bytes)
    assert plan["output_bytes"] == sum(p.stat().st_size for p in bundle.path.glob("*.safetensors"))
    assert plan["estimate"]["pack_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["/nowhere", "-o", "x"], 2, "no such file or folder"),
        (["{hf}", "-o", "{out}", "--tiers", "npu"], 2, "--tiers names gpu, cpu or both"),
        (["{hf}", "-o", "{out}", "--shard-size", "large"], 2, "--shard-size: not a size"),
        (["{hf}", "-o", "{out}", "--memory-limit", "10MiB"], 6, "memory limit is too small"),
        (["{hf}", "-o", "{hf}/x"], 2, "inside an input"),
    ],
)
def test_one_sentence_and_an_exit_code(invoke, hf_dir, tmp_path, arguments, code, text):
    filled = [argument.format(hf=hf_dir, out=tmp_path / "out") for argument in arguments]
    result = invoke(*filled)
    assert result.exit_code == code
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("krasis-convert: error: ")
    assert text in lines[-1]
    assert "Traceback" not in result.output


def test_errors_of_the_system_are_sentences(invoke, hf_dir, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(cli, "prepare", broken)
    result = invoke(hf_dir, "-o", tmp_path / "out")
    assert result.exit_code == 6
    assert "/data/x: the system refused: No space left on device" in result.stderr
    assert "free some disk space" in result.stderr
    monkeypatch.setattr(cli, "prepare", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert "out of memory" in invoke(hf_dir, "-o", tmp_path / "out").stderr


def test_help_and_version(invoke):
    text = invoke("--help").stdout
    for option in ("--gpu-bits", "--gpu-group", "--cpu-format", "--dry-run", "--force", "--restart"):
        assert option in text
    assert "krasis-convert" in invoke("--version").stdout


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(
    model_class, shape_class, run, digests_of, tmp_path
):
    model = model_class(shape_class(layers=4, experts=32))
    hf = model.write_hf(tmp_path / "hf")
    out = tmp_path / "tiny.krasis"
    command = [*COMMAND, str(hf), "-o", str(out), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = partial_path(out) / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 2000):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1] == "krasis-convert: stopped; run the same command to continue"
    assert "Traceback" not in text
    assert not out.exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "continuing" in again.stderr
    assert digests_of(out) == run([hf], tmp_path / "other.krasis").files()


def test_plain_progress_lines_without_a_terminal(hf_dir, run, tmp_path, monkeypatch):
    monkeypatch.setattr("krasis.convert.progress.PLAIN_INTERVAL_S", 0.0)
    text = run([hf_dir], tmp_path / "out.krasis", verbosity=1).messages
    lines = [line for line in text.splitlines() if line.startswith("converting: ")]
    assert len(lines) > 10
    assert lines[-1].startswith("converting: 100.0 %")
    assert "GB/s" in lines[-1]
    assert lines[-1].endswith("left")


def test_a_bar_on_a_terminal(hf_dir, tmp_path):
    main_fd, side_fd = os.openpty()
    fcntl.ioctl(side_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [*COMMAND, str(hf_dir), "-o", str(tmp_path / "out.krasis")]
    process = subprocess.Popen(command, stderr=side_fd)
    os.close(side_fd)
    text = b""
    try:
        while part := os.read(main_fd, 4096):
            text += part
    except OSError:  # the other side is gone
        pass
    os.close(main_fd)
    assert process.wait() == 0, text
    assert b"converting: 100%" in text
    assert b"next: krasis-run" in text


def test_the_installed_script(hf_dir, tmp_path):
    script = Path(sys.executable).parent / "krasis-convert"
    if not script.exists():
        pytest.skip("the package is not installed with its scripts")
    result = subprocess.run(
        [script, hf_dir, "-o", tmp_path / "o", "--dry-run"], capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
