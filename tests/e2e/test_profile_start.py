"""scripts/profile_start.py: stages of a real start, those of several ranks, and a command that fails."""

import json
from pathlib import Path

from click.testing import CliRunner

from krasis.formats.process.stages import Stage, read_stage
from scripts import profile_start


def test_lines_of_a_log_are_read() -> None:
    line = "krasis.stages: open the device: 0.1173 s from 50097.3032"
    assert read_stage(line) == Stage("open the device", 50097.3032, 0.1173)
    assert read_stage("[rank 2] krasis.stages: a: b: 2.5000 s from 7.2500\n") == Stage("a: b", 7.25, 2.5, 2)
    for other in ("krasis.runtime.engine: opened x in 0.016 s: a from 5.0", "", "krasis.stages: odd"):
        assert read_stage(other) is None


def test_a_stage_that_happens_again_is_one_row() -> None:
    stages = [Stage("b", 12.0, 1.0), Stage("a", 11.0, 0.5, 1), Stage("a", 13.0, 1.0), Stage("b", 11.5, 2.0)]
    rows = profile_start.rows_of(stages, 10.0)
    assert [(row.rank, row.name, row.begin_s, row.seconds, row.count) for row in rows] == [
        (1, "a", 1.0, 0.5, 1),
        (0, "b", 1.5, 3.0, 2),
        (0, "a", 3.0, 1.0, 1),
    ]


def test_a_start_is_told_stage_by_stage(trained_bundle: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "start.json", tmp_path / "log"
    options = [
        str(trained_bundle),
        "--device",
        "cpu",
        "--json",
        str(out),
        "--log",
        str(log),
        "--",
        "--threads",
        "1",
    ]
    result = CliRunner().invoke(profile_start.main, options)
    assert result.exit_code == 0, result.output
    (start,) = json.loads(out.read_text())
    rows = {row["name"]: row for row in start["rows"]}
    names = ["import the engine", "open the bundle", "open the backend"]
    assert [name for name in rows if name in names] == names
    ends = [rows[name]["begin_s"] + rows[name]["seconds"] for name in names]
    assert ends == sorted(ends)
    assert ends[-1] < start["first_token_s"] < start["total_s"]
    assert all(name in result.output for name in names)
    assert "first token" in log.read_text()


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    result = CliRunner().invoke(profile_start.main, [str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 1
    assert "krasis-run ended with 3" in result.output
    assert "no manifest" in result.output
