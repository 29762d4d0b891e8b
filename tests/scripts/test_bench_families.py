"""The stage of several families, on a model that a test can wait for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.bench import families
from scripts.bench.document import write_document
from scripts.bench.families import CUTS, Cut
from scripts.bench.goals import goals
from scripts.bench.peers import Krasis, LlamaBench, llama_cpp
from scripts.bench.record import FAMILIES, Record, Run
from scripts.bench.speed import Plan
from scripts.models import make_random_gguf
from scripts.models.make_random_gguf import gguf_bytes, spec_of

PLAN = Plan((1,), (40,), (8,), 1, 1, 300.0)
SMALL = {
    "hidden_size": 128,
    "num_experts": 4,
    "vocab_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_random_gguf, "POOL_BYTES", 1 << 18)


def test_models_are_cut_as_their_titles_say_and_fit_into_memory() -> None:
    titles = [cut.title for cut in CUTS]
    assert titles[0] == "qwen3.5-35b-a3b, 4 of 40 layers, 128 of 256 experts Q8_0"
    assert titles[1] == "gpt-oss-20b, 4 of 24 layers, 32 of 32 experts MXFP4"
    for cut in CUTS:
        assert 2 * gguf_bytes(cut.shape, cut.experts) < 4e9, cut.name
        layers = spec_of(cut.shape).layers
        assert any(layer.experts is not None for layer in layers), cut.name
        whole = {type(layer.mixer) for layer in spec_of(type(cut.shape).named(cut.name)).layers}
        assert {type(layer.mixer) for layer in layers} == whole, cut.name


def fake_llama(tmp_path: Path, rate: float) -> LlamaBench:
    """A llama-bench that looks at its file and says how fast it was."""
    rows = [
        {"n_prompt": prompt, "n_gen": generate, "samples_ts": [rate], "build_commit": "x", "build_number": 1}
        for prompt, generate in ((40, 0), (0, 8))
    ]
    script = tmp_path / "llama-bench"
    script.write_text(f"#!/bin/sh\ntest -s \"$2\" || exit 1\ncat <<'END'\n{json.dumps(rows)}\nEND\n")
    script.chmod(0o755)
    return llama_cpp(script)


def test_the_stage_runs_both_on_one_file_and_leaves_none(tmp_path: Path) -> None:
    cut = Cut("gpt-oss-20b", "mxfp4", tuple(SMALL.items()))
    record, work = Record(tmp_path / "r.h5"), tmp_path / "work"
    work.mkdir()
    programs = [Krasis(), fake_llama(tmp_path, 0.001)]
    said: list[str] = []

    def run(cuts: list[Cut]) -> bool:
        return families.run_stage(record, cuts, programs, PLAN, work, lambda: True, said.append)

    assert run([cut])
    runs = record.runs(FAMILIES)
    assert sorted((run.subject, run.case) for run in runs) == [
        ("krasis", "pp40"), ("krasis", "tg8"), ("llama.cpp", "pp40"), ("llama.cpp", "tg8")
    ]  # fmt: skip
    assert not any(run.error for run in runs), [run.error for run in runs]
    decode = next(run for run in runs if run.subject == "krasis" and run.case == "tg8")
    assert decode.metrics["weights_gbps"][0] > 0
    assert list(work.iterdir()) == []
    said.clear()
    assert run([cut])  # nothing is left to do
    assert said == []
    write_document(record, tmp_path / "doc.md", None)
    text = (tmp_path / "doc.md").read_text("utf-8")
    assert "### gpt-oss-20b, 2 of 24 layers, 4 of 32 experts MXFP4" in text
    assert "has not been run" not in text
    assert [goal.met for goal in goals(runs)] == [True, None, True, None]


def test_llama_cpp_gets_a_layout_that_it_runs() -> None:
    program = llama_cpp(Path("llama-bench"))
    flags = {}
    for cut in CUTS:
        changed = families.with_layout(program, cut)
        assert isinstance(changed, LlamaBench)
        flags[cut.name] = changed.flags[changed.flags.index("--repack") + 1]
        assert changed.flags.count("--repack") == 1
    assert flags["deepseek-v3"] == "0"
    assert flags["gpt-oss-20b"] == "1"


def test_a_model_that_cannot_be_made_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "tool", lambda name: "/nowhere")
    cut = Cut("gpt-oss-20b", "mxfp4", tuple(SMALL.items()))
    record = Record(tmp_path / "r.h5")
    assert families.run_stage(record, [cut], [Krasis()], PLAN, tmp_path, lambda: True, print)
    runs = record.runs(FAMILIES)
    assert {run.case for run in runs} == {"pp40", "tg8"}
    assert all("/nowhere" in run.error or "cannot be started" in run.error for run in runs)
    assert not (tmp_path / "gpt-oss-20b.gguf").exists()


def test_goals_of_families_are_their_own() -> None:
    def run(subject: str, case: str, rate: float) -> Run:
        return Run(
            stage=FAMILIES, model="m", case=case, threads=2, subject=subject, round=0,
            metrics={"tokens_per_s": (rate,)},
        )  # fmt: skip

    runs = [run("krasis", "tg64", 11.0), run("llama.cpp", "tg64", 10.0)]
    found = {goal.what: goal for goal in goals(runs)}
    goal = found["m, tg64, 2 thr, against llama.cpp"]
    assert (goal.wanted, goal.met) == (">= 1.2x", False)
    better = [replace(runs[0], metrics={"tokens_per_s": (12.5,)}), runs[1]]
    assert goals(better)[0].met
