"""The Python suite's device tests on the real GPU: logits against transformers in float32, hybrid decode."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from device.context import REPOSITORY, Context

TESTS = ("tests/device",)


class TestsFailedError(Exception):
    """Some tests failed; the log has pytest's output."""


def run(context: Context) -> dict[str, Any]:
    """Raises TestsFailedError if a test fails, or if none ran."""
    report = context.folder / "stages" / "correctness.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [str(REPOSITORY / path) for path in TESTS]
    env = {**os.environ, "KRASIS_CHECK_DEVICE": context.device, "KRASIS_CHECK_SIZE": context.size}
    code = subprocess.run(command, cwd=REPOSITORY, env=env, check=False).returncode
    outcome = read_report(report)
    if code or not outcome["passed"]:
        raise TestsFailedError(f"pytest exits with {code}: {outcome}")
    return outcome


def read_report(path: Path) -> dict[str, Any]:
    """Counts by outcome, what every test measured (its recorded properties), and why tests were skipped."""
    counts: Counter[str] = Counter()
    measured: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    # Written by our own pytest a moment ago.
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314
        name = case.get("name", "?")
        failed = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        counts["failed" if failed else "passed" if skip is None else "skipped"] += 1
        if skip is not None:
            skipped[name] = skip.get("message", "")
        properties = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        if properties:
            measured[name] = properties
    return {
        **{key: counts[key] for key in ("passed", "failed", "skipped")},
        "measured": measured,
        "skips": skipped,
    }
