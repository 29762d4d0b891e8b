"""The command's other half: ``krasis-convert --refresh-text SOURCE model.krasis``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from krasis.convert.progress import Reporter
from krasis.convert.refresh import Refreshed, refresh_text
from krasis.formats.errors import UsageError


def run_refresh(
    source: Path,
    bundles: Sequence[Path],
    output: Path | None,
    options: Mapping[str, Any],
    reporter: Reporter,
    *,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Does it, and says what was replaced. Raises KrasisError."""
    if len(bundles) != 1 or output is not None:
        raise UsageError(
            "--refresh-text changes one bundle in its place",
            got=f"{len(bundles)} paths" + (" and -o" if output is not None else ""),
            hint="krasis-convert --refresh-text SOURCE model.krasis",
        )
    done = refresh_text(source, bundles[0], reporter, force=options["force_text"], plan_only=plan_only)
    if as_json:
        print(json.dumps({"krasis_convert": 1, "bundle": str(bundles[0]), **asdict(done)}, indent=2))
    for line in _describe(done, bundles[0], plan_only=plan_only):
        reporter.say(line)


def _describe(done: Refreshed, path: Path, *, plan_only: bool) -> list[str]:
    if not done.replaced and not done.removed:
        return [f"{path}: has these text files already; nothing was changed"]
    would = "would be " if plan_only else ""
    lines = [f"{path}: {would}replaced: {', '.join(done.replaced) or 'nothing'}"]
    if done.removed:
        lines.append(f"{would}removed, since it belonged to what is replaced: {', '.join(done.removed)}")
    if done.kept:
        lines.append(f"as before: {', '.join(done.kept)}, and all weights")
    return lines
