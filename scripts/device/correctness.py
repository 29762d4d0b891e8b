"""The Python suite's device tests on the real GPU: logits against transformers in float32, hybrid decode."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.device.context import REPOSITORY, Context

TESTS = ("tests/device",)
# The suite runs these without a GPU.
GPU_TESTS = (
    "tests/runtime/device/test_cuda_device.py",
    "tests/runtime/gpu/kernels",
    "tests/runtime/gpu/test_attention.py",
    "tests/e2e/test_families.py",
    "tests/e2e/test_gpu_batches.py",
    "tests/e2e/test_gpu_between.py",
    "tests/e2e/test_gpu_callers.py",
    "tests/e2e/test_gpu_delta.py",
    "tests/e2e/test_gpu_families.py",
    "tests/e2e/test_gpu_host_kv.py",
    "tests/e2e/test_gpu_kv8.py",
    "tests/e2e/test_gpu_prefill.py",
    "tests/e2e/test_gpu_states.py",
    "tests/e2e/test_gpu_windows.py",
    "tests/e2e/test_index.py",
    "tests/e2e/test_mxfp4.py",
    "tests/e2e/test_nemotron.py",
)
FAILURE_CHARS = 200


def run(context: Context) -> dict[str, Any]:
    """Counts and what was measured; ``failed`` says so if a test failed, or if none ran."""
    report = context.folder / "stages" / "correctness.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1"]  # which has a place for what a test measured
    tests = (*TESTS, *GPU_TESTS) if context.device == "cuda" else TESTS
    command += [str(REPOSITORY / path) for path in tests]
    env = {**os.environ, "KRASIS_CHECK_DEVICE": context.device, "KRASIS_CHECK_SIZE": context.size}
    if context.device == "cuda":
        env["KRASIS_TEST_DEVICE"] = "cuda"
    code = subprocess.run(command, cwd=REPOSITORY, env=env, check=False).returncode
    outcome = read_report(report)
    if code or not outcome["num_passed"]:
        told = "; ".join(f"{name}: {why}" for name, why in outcome["failures"].items())
        outcome["failed"] = f"pytest exits with {code}: {told}"
    return outcome


def read_report(path: Path) -> dict[str, Any]:
    """Counts by outcome, what every test measured (its recorded properties), and why tests were skipped."""
    counts: Counter[str] = Counter()
    measured: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    failures: dict[str, str] = {}
    # Written by our own pytest a moment ago.
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314
        name = case.get("name", "?")
        skip, problem = case.find("skipped"), case.find("failure")
        problem = case.find("error") if problem is None else problem
        counts["failed" if problem is not None else "passed" if skip is None else "skipped"] += 1
        if problem is not None:
            failures[name] = " ".join(problem.get("message", "").split())[:FAILURE_CHARS]
        if skip is not None:
            skipped[name] = skip.get("message", "")
        properties = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        if properties:
            measured[name] = properties
    return {
        **{f"num_{key}": counts[key] for key in ("passed", "failed", "skipped")},
        "failures": failures,
        "measured": measured,
        "skips": skipped,
    }
