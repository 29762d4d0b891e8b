"""docs/JSON.md and docs/PYTHON.md name what there is, and all of it."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert_main
from krasis.convert.conversion import DryRun, Summary
from krasis.runtime import Answer, Engine, Piece
from krasis.runtime.cli.bench import main as bench_main
from krasis.runtime.cli.info_command import main as info_main
from krasis.runtime.cli.run import main as run_main

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/assets/tiny-qwen3-moe"
TEXT = (ROOT / "docs/JSON.md").read_text()
SECTIONS = dict(
    re.findall(r"^## (krasis[- ]\w+) --json.*?\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
)


def named(section: str) -> set[str]:
    return set(re.findall(r"`([a-z_0-9]+)`", SECTIONS[section]))


def first_column(section: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?`) \|", SECTIONS[section], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def record(main, *arguments) -> dict:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("forms") / "tiny.krasis"
    made = record(convert_main, MODEL, "-o", out, "--quiet", "--json")
    assert made.pop("krasis_convert") == 1
    assert set(made) <= first_column("krasis-convert")
    assert {field.name for field in fields(Summary)} <= set(made)
    return out


def test_a_plan_of_a_conversion(tmp_path):
    plan = record(convert_main, MODEL, "-o", tmp_path / "x.krasis", "--dry-run", "--quiet", "--json")
    assert plan.pop("krasis_convert") == 1
    assert set(plan) == {field.name for field in fields(DryRun)}
    both = set(plan) | {field.name for field in fields(Summary)} | {"gb_per_s"}
    assert first_column("krasis-convert") == both


def test_an_answer(bundle):
    options = ("--prompt", "def", "--max-tokens", 2, "--ctx", 64, "--threads", 1, "--device", "cpu", "--json")
    answer = record(run_main, bundle, *options)
    assert answer.pop("krasis_run") == 1
    assert set(answer) == first_column("krasis-run")


def test_what_krasis_info_says(bundle):
    machine = ("--gpus", "16GiB", "--ram", "64GiB", "--cpus", 8)
    summary = record(info_main, bundle, "--json")
    more = record(info_main, bundle, "--plan", "--tensors", "--verify", "--json", *machine)
    planned = record(info_main, MODEL, "--plan", "--json", *machine)
    found = {**summary, **more, **planned}
    assert found.pop("krasis_info") == 1
    assert set(found) | {"environment", "pinned_memory"} == first_column("krasis-info")
    parts = [*(found[name] for name in ("bundle", "verify", "plan", "conversion")), found["tensors"][0]]
    assert {key for part in parts for key in part} <= named("krasis-info")


def test_a_measurement(bundle):
    options = ("-p", 4, "-n", 2, "-r", 1, "--threads", 1, "--device", "cpu", "--json")
    found = record(bench_main, bundle, *options)
    assert found.pop("krasis_bench") == 1
    assert set(found) == first_column("krasis bench")


def test_the_names_for_python():
    text = (ROOT / "docs/PYTHON.md").read_text()
    kinds = {"Engine": Engine, "Answer": Answer, "Piece": Piece}
    names = re.findall(r"`(Engine|Answer|Piece)\.(\w+)", text)
    fields_of_objects = {"stats"}
    missing = [f"{kind}.{name}" for kind, name in names if not hasattr(kinds[kind], name)]
    assert [one for one in missing if one.partition(".")[2] not in fields_of_objects] == []
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public - {name for kind, name in names if kind == "Engine"} == {"architecture"}


def test_the_plan_of_the_document():
    text = (ROOT / "docs/PYTHON.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "make_plan" in block
    )
    config = json.loads((ROOT / "tests/formats/models/configs/qwen3-30b-a3b.json").read_text())
    place = {"config": config}
    exec(code, place)  # noqa: S102 -- it is our own
    assert place["plan"].decode.tokens_per_s > 0
