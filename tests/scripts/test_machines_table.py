"""The table of machines: its figures are the planner's, and the README's rows are some of the document's."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from krasis.runtime.cli.info_command import main as krasis_info
from scripts import machines_table


def test_a_row_says_what_the_planner_says() -> None:
    machine = machines_table.MACHINES[1]
    arguments = ["--plan", "--json", "--shape", "qwen3-235b-a22b", *machine.arguments("rtx4090")]
    plan = json.loads(CliRunner().invoke(krasis_info, arguments).stdout)["plan"]
    low, high = plan["ranges"]["prefill_tokens_per_s"]
    row = machines_table.row(machine, "rtx4090", "qwen3-235b-a22b")
    # 241 GB of 8-bit experts beside 117 GB of the GPU's do not fit in 256 GiB.
    assert f"| rtx4090 | qwen3-235b-a22b | 4 bits | {low:.0f}-{high:.0f} |" in row
    assert any("CPU experts in int4" in note for note in plan["notes"])
    refused = machines_table.row(machines_table.MACHINES[3], "none", "deepseek-v3")
    assert "the model does not fit in RAM" in refused


def test_the_readme_has_rows_of_the_document() -> None:
    document = (machines_table.ROOT / "docs" / "MACHINES.md").read_text("utf-8")
    readme = (machines_table.ROOT / "README.md").read_text("utf-8")
    rows = [line for line in document.splitlines() if line.startswith("| ")]
    assert machines_table.short(rows) in readme
    with pytest.raises(click.ClickException, match="machines: begin"):
        machines_table.in_readme("no marks", "")
