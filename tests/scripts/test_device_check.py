"""scripts/device_check.sh: every stage on the double at tiny sizes, so that what is found on a GPU is not a
typo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.uniform import spec_of
from krasis.runtime.planning.sizes import sizes_of_shape
from scripts.device import build, places, ranks, report, runner, startup
from scripts.device.context import REAL, SIZES, Context
from scripts.device.correctness import read_report
from scripts.device.limits import prefill_work
from scripts.device.places import layers_within, request_of
from scripts.device.stages import STAGES, Stage
from scripts.device.state import Entry, State, source_digest
from scripts.device.timing import time_calls
from tests.support.patience import PATIENCE_S
from tests.support.planning import with_experts

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

ON_THE_DOUBLE = [
    "rates",
    "registration",
    "gemm",
    "prefill-30b",
    "decode-30b",
    "families",
    "kv",
    "serving",
    "short",
    "startup",
]


@pytest.fixture(scope="module")
def double() -> None:
    from krasis.runtime.device.library import double_library

    try:
        double_library()
    except NativeError as error:
        if "KRASIS_CUDA_DOUBLE" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(tmp_path_factory.mktemp("krasis-check"), "double", "tiny")


def test_the_stages_run_on_the_double(double: None, context: Context) -> None:
    state = State(context.folder / "results.json")
    for name in ON_THE_DOUBLE:
        record = STAGES[name].load()(context)
        state.put(Entry(name, "done", "0", 1.0, json.loads(json.dumps(record, allow_nan=False))))
    text = report.to_markdown(State(state.path))
    for heading in (
        "What the machine does",
        "Grouped product",
        "Prefill, Qwen3-30B",
        "Decode, Qwen3-30B",
        "Prefill, other families",
        "Keys and values, Qwen3-30B",
        "Serving, Qwen3-235B",
        "Short prompts, Qwen3-235B",
        "Start-up",
    ):
        assert f"## {heading}" in text
    results = {name: entry.result for name, entry in state.entries.items()}
    prefill = results["prefill-30b"]
    run = prefill["runs"]["all streamed"]
    assert run["last_prefill"]["bytes_copied"] == run["all_bytes"] == run["work"]["streamed_bytes"] > 0
    assert prefill["ratio"] == run["median_s"] / run["work"]["limit_s"]
    decode = results["decode-30b"]["runs"]
    assert (
        decode["all streamed"]["split"]["num_cpu_experts"]
        > decode["all streamed"]["split"]["num_gpu_experts"]
    )
    assert decode["all VRAM"]["split"]["num_cpu_experts"] == 0
    assert decode["CPU alone"]["engine"]["description"].startswith("CPU")
    assert [(row["shape"], row["rows"]) for row in results["gemm"]["rows"]] == [
        (stack.label, rows) for stack in context.sizes.stacks for rows in context.sizes.gemm_rows
    ]
    families = results["families"]["rows"]
    assert [row["label"] for row in families] == ["qwen3.5-35b-a3b", "gpt-oss-20b"]
    for row in families:
        assert row["last_prefill"]["bytes_copied"] == row["all_bytes"] > 0
        assert row["ratio"] == row["median_s"] / row["work"]["limit_s"]
    serving = results["serving"]
    assert min(serving["shared"]["ratio"], *(row["ratio"] for row in serving["rows"])) > 0
    assert [row["rows"] for row in serving["rows"]] == [1, 2]
    assert serving["between"]["num_tokens"] >= 1
    assert 0 < serving["between"]["longest_gap_s"] < serving["between"]["whole_model_gap_s"]
    for row in results["short"]["rows"]:
        assert 0 < row["routed"]["bytes_copied"] < row["streamed"]["bytes_copied"]
    assert results["startup"]["runs"]["cold"]["load"]["finished"]
    for folder in (places.ram_folder(context), places.disk_folder(context)):
        for bundle in folder.glob("*.krasis"):
            assert places.opens(bundle)
    remove_ram(context)


def remove_ram(context: Context) -> None:
    import shutil

    shutil.rmtree(places.ram_folder(context))


@pytest.mark.slow
def test_ranks(double: None, context: Context) -> None:
    record = ranks.run(context)
    rows = [line.split(" | ") for line in report.ranks_section(json.loads(json.dumps(record)))[-4:]]
    for name in ("runs", "cards"):
        assert set(record[name]) == {"1", "2"}
        one, two = record[name].values()
        assert one["relative_distance"] == 0
        assert two["relative_distance"] < 0.02  # sums in float32 may be the same, bit for bit
        assert min(run["decode_tokens_per_s"] for run in (one, two)) > 0
        assert one["vram_bytes"] == two["vram_bytes"]
    assert record["runs"]["1"]["decoded_on"] != record["cards"]["1"]["decoded_on"]  # few, and all on the GPU
    assert [row[0] for row in rows] == ["| 1", "| 2"] * 2
    assert rows[1][-1] == f"{100 * record['runs']['2']['relative_distance']:.2f} %, same token |"
    remove_ram(context)


def test_distances_are_of_each_runs_own_logits(context: Context) -> None:
    runs = {"1": {"logits": np.array([3.0, 4.0])}, "2": {"logits": np.array([3.0, 3.0])}}
    ranks.against_one(context, runs)
    assert runs["1"] == {"relative_distance": 0.0, "same_token": True}
    assert runs["2"] == {"relative_distance": pytest.approx(1 / 5), "same_token": False}
    assert ranks.logits_path(context, 1) != ranks.logits_path(context, 2)


# ---- the command -------------------------------------------------------------------------------------------


def device_check(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / "device_check.sh"), *(str(one) for one in arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHON": sys.executable, **env},
    )  # fmt: skip


def test_the_command_resumes_and_reports(tmp_path: Path) -> None:
    flags = ("--device", "double", "--size", "tiny", "--stage", "rates")
    first = device_check(*flags, KRASIS_DEVICE_DIR=str(tmp_path / "work"), OUT=str(tmp_path / "out"))
    assert first.returncode == 0, first.stderr
    assert "rates: done in" in first.stdout
    assert "## What the machine does" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "logs" / "rates.log").exists()
    # On a fresh machine, with what the first one found.
    merged = device_check(*flags, "--merge", tmp_path / "out" / "results.json", "--dir", tmp_path / "other")
    assert merged.returncode == 0, merged.stderr
    assert "rates: done before" in merged.stdout


def test_mistakes(tmp_path: Path) -> None:
    wrong = device_check("--stage", "rates,lunch", "--dir", tmp_path)
    assert wrong.returncode == 2
    assert "lunch" in wrong.stderr
    without = device_check("--dir", tmp_path, PYTHON="/bin/false")
    assert without.returncode == 1
    assert "click" in without.stderr


def entry_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, limit_s: float = 60.0) -> Entry:
    """What comes of a stage that runs this Python text; ``RESULT`` is where its result goes."""
    context = Context(tmp_path, "double", "tiny")
    text = f"RESULT = {str(runner.result_path(context, 'x'))!r}\n{program}"
    monkeypatch.setattr(runner, "child_command", lambda *_: [sys.executable, "-c", text])
    return runner.run_stage(context, Stage("x", "x:run", (), "", limit_s), "d1")


def test_outcomes_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = entry_of(monkeypatch, tmp_path, "open(RESULT, 'w').write('{\"a\": 1}')")
    assert (done.status, done.result, done.error) == ("done", {"a": 1}, "")
    skipped = entry_of(monkeypatch, tmp_path, "open(RESULT, 'w').write('{\"skipped\": \"no GPU\"}')")
    assert (skipped.status, skipped.error) == ("skipped", "no GPU")
    partly = entry_of(monkeypatch, tmp_path, 'open(RESULT, \'w\').write(\'{"failed": "two", "a": 1}\')')
    assert (partly.status, partly.error, partly.result) == ("failed", "two", {"a": 1})
    failed = entry_of(monkeypatch, tmp_path, "raise ValueError('broken')")
    assert failed.status == "failed"
    assert failed.error.startswith("exit 1: ValueError: broken")
    silent = entry_of(monkeypatch, tmp_path, "pass")  # the old result must not count
    assert silent.status == "failed"


def test_a_stage_over_its_limit_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(100)"
    )
    begin = time.monotonic()
    entry = entry_of(monkeypatch, tmp_path, program, limit_s=1.5)
    assert time.monotonic() - begin < 20
    assert entry.status == "failed"
    assert "over the limit" in entry.error
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_state(tmp_path: Path) -> None:
    state = State(tmp_path / "results.json")
    state.put(Entry("a", "done", "1", 2.0, {"x": 1}))
    state.put(Entry("b", "failed", "1", 2.0, {}, "broke | here"))
    again = State(tmp_path / "results.json")
    assert again.is_done("a", "1")
    assert not again.is_done("a", "2")
    assert not again.is_done("b", "1")
    assert not again.is_done("c", "1")
    text = report.to_markdown(again)
    assert "| b | failed | 2 | broke / here |" in text


def test_a_digest_tells_sources_and_sizes_apart(tmp_path: Path) -> None:
    real, tiny = (Context(tmp_path, "double", size) for size in SIZES)
    digest = source_digest(("scripts/device",), real)
    assert digest == source_digest(("scripts/device",), Context(tmp_path / "elsewhere", "double", real.size))
    assert digest != source_digest(("scripts/device",), tiny)
    assert digest != source_digest(("scripts/device/cli.py",), real)
    for stage in STAGES.values():
        assert all((SCRIPTS.parent / path).exists() for path in stage.sources)


# ---- the build, without building ---------------------------------------------------------------------------


class Done:
    def wait(self) -> int:
        return 0


def test_the_build_is_offline_and_for_this_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, context: Context
) -> None:
    for name, text in {"nvidia-smi": "echo 8.9", "nvcc": "echo release 13.0"}.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("ARCH", raising=False)
    monkeypatch.setattr(build, "NEEDED", {"json": "json"})
    started: list[tuple[list[str], dict[str, str]]] = []

    def start(command: Any, env: Any) -> Any:
        started.append((list(command), dict(env)))
        return Done()

    monkeypatch.setattr(build, "start", start)
    found = build.run(Context(context.folder, wheels=tmp_path / "none"))
    assert found == {"architecture": "89", "nvcc": "release 13.0", "wheels": []}
    (native, native_env), (pip, _) = started
    assert native[-1].endswith("csrc/cuda/tests/device.sh")
    assert Path(native[-1]).exists()
    assert native_env["ARCH"] == "89"
    assert native_env["BUILD_ONLY"] == "1"
    for flag in ("--no-index", "--no-build-isolation", "--no-deps", "--target"):
        assert flag in pip
    assert "cmake.define.KRASIS_CUDA=on" in pip
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=89" in pip


def test_stages_find_what_was_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context = Context(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setenv("KRASIS_LIB_DIR", "/mine")
    assert runner.child_environment(context)["PYTHONPATH"] == "/before"
    assert runner.child_environment(context)["KRASIS_LIB_DIR"] == "/mine"
    (context.site / "krasis" / "_lib").mkdir(parents=True)
    context.wheel_site.mkdir()
    env = runner.child_environment(context)
    assert env["PYTHONPATH"] == f"{context.site}:{context.wheel_site}:/before"
    assert env["KRASIS_LIB_DIR"] == str(context.site / "krasis" / "_lib")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(build.BuildError, match=r"no-such-package.*pip download"):
        build.run(Context(tmp_path, wheels=tmp_path))
    monkeypatch.setattr(build, "NEEDED", {})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="nvcc"):
        build.run(Context(tmp_path, wheels=tmp_path))
    with pytest.raises(build.BuildError, match="driver"):
        build.compute_capability()


def test_hopper_is_built_with_its_own_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compute_capability() == "90a"


def test_what_a_stage_imports_is_installed_here() -> None:
    tools = {"scikit-build-core", "cmake", "ninja"}  # pip fetches those by itself where it may
    assert set(build.missing_modules(build.NEEDED)) <= tools


# ---- figures -----------------------------------------------------------------------------------------------


def test_the_limit_of_a_prompt_by_hand() -> None:
    from scripts.models.make_random_bundle import architecture_of

    arch = architecture_of(places.shape_of(REAL.stack("235b"), 2))
    sizes = with_experts(sizes_of_shape(spec_of(arch)), gpu_bytes=10**7)
    work = prefill_work(sizes, 1000)
    assert work.streamed_bytes == 2 * 128 * 10**7
    assert work.expert_flops == 2 * 2 * 1000 * 8 * 3 * 4096 * 1536
    projections = 4096 * (64 + 2 * 4) * 128 + 64 * 128 * 4096
    assert work.dense_flops == 2 * 2 * 1000 * (projections + 128 * 4096)
    assert work.attention_flops == 2 * 2 * 2 * 64 * 128 * (1000 * 1001 // 2)
    assert work.limit_s(25.0, 1e6) == 2 * 128 * 10**7 / 25e9
    assert work.limit_s(1e9, 0.5) == work.flops / 0.5e12


def test_as_many_layers_as_fit(context: Context) -> None:
    real = Context(context.folder, "double", "real")
    stack = REAL.stack("235b")
    sizes = {count: places.bundle_bytes(request_of(real, stack, count, ("gpu",))) for count in (1, 5, 94)}
    assert layers_within(real, stack, ("gpu",), 0) == 1
    assert layers_within(real, stack, ("gpu",), sizes[5]) == 5
    assert layers_within(real, stack, ("gpu",), sizes[5] - 1) == 4
    assert layers_within(real, stack, ("gpu",), 10 * sizes[94]) == 94
    assert 115e9 < sizes[94] < 130e9


def test_timing_counts_calls() -> None:
    calls: list[float] = []
    timing = time_calls(lambda: calls.append(time.sleep(0.002) or 0.0), lambda: None, repeats=3)
    assert 0.0015 < timing.best_s <= timing.median_s < 0.05


def test_disk_rate_reads_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "READ_BYTES", 1 << 16)
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    rate, how = startup.read_gbps(tmp_path / "file")
    assert rate > 0
    assert "readers" in how


def test_the_report_of_pytest_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(
        "<testsuites><testsuite><testcase name='a'><properties><property name='relative_error' value='1e-3'/>"
        "</properties></testcase><testcase name='b'><failure message='it&#10;broke'/></testcase>"
        "<testcase name='c'><skipped message='no GPU'/></testcase></testsuite></testsuites>"
    )
    outcome = read_report(tmp_path / "r.xml")
    assert (outcome["num_passed"], outcome["num_failed"], outcome["num_skipped"]) == (1, 1, 1)
    assert outcome["failures"] == {"b": "it broke"}
    assert outcome["measured"] == {"a": {"relative_error": "1e-3"}}
    assert outcome["skips"] == {"c": "no GPU"}
    text = "\n".join(report.correctness_section(outcome))
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "**failed** b: it broke" in text
