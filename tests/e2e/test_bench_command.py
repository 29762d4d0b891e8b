"""``krasis bench`` on the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.runtime.cli.bench import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from krasis.convert.conversion import convert, prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    model = Path(__file__).parents[1] / "assets/tiny-qwen3-moe"
    out, reporter = tmp_path_factory.mktemp("bench") / "tiny.krasis", Reporter(0)
    convert(prepare([model], out, ConvertSettings(tiers=("cpu",)), reporter), reporter)
    return out


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_figures(bundle):
    options = ("-p", 20, "-n", 5, "-r", 2, "--threads", 1, "--device", "cpu")
    record = json.loads(run(bundle, *options, "--json").stdout)
    assert record["krasis_bench"] == 1
    assert len(record["prefill_tokens_per_s"]) == len(record["decode_tokens_per_s"]) == 2
    assert min(record["prefill_tokens_per_s"] + record["decode_tokens_per_s"]) > 0
    shown = run(bundle, *options).stdout
    assert "prefill" in shown
    assert "5 tokens" in shown


def test_one_sentence():
    result = run("/nowhere.krasis")
    assert result.exit_code == 3
    assert result.stderr.startswith("krasis bench: ")
